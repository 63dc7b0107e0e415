"""The tables of the checkpoint, and how older ones become today's. SQL text alone: `checkpoint` runs it.

A schema is never edited once it was released: what changes is a further migration, run in one transaction.
"""

ID_RECIPE_VERSION = 1

# What brings a checkpoint from schema n to n + 1, n being the place in this list; a new one goes through all of them.
MIGRATIONS: tuple[str, ...] = (
    f"""
CREATE TABLE inputs (path TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE files (
    file_id INTEGER PRIMARY KEY,
    path TEXT NOT NULL,              -- where it was last seen
    device INTEGER, inode INTEGER,   -- both NULL once other content took its place
    head_bytes INTEGER NOT NULL DEFAULT 0, head_hash TEXT NOT NULL DEFAULT '',
    tail_bytes INTEGER NOT NULL DEFAULT 0, tail_hash TEXT NOT NULL DEFAULT '',
    position INTEGER NOT NULL,       -- in bytes: everything before it is settled
    history INTEGER NOT NULL         -- 1: there before its log was followed, and never read
);
CREATE TABLE books (file_id INTEGER NOT NULL, name TEXT NOT NULL, count INTEGER NOT NULL,
    PRIMARY KEY (file_id, name)) WITHOUT ROWID;
CREATE TABLE dead_letters (
    dead_letter_id INTEGER PRIMARY KEY,
    file_id INTEGER NOT NULL, start_offset INTEGER NOT NULL, end_offset INTEGER NOT NULL,
    reason TEXT NOT NULL, detail TEXT NOT NULL, line BLOB NOT NULL, kept_at REAL NOT NULL
);
CREATE TABLE recipes (name TEXT PRIMARY KEY, version INTEGER NOT NULL) WITHOUT ROWID;
INSERT INTO recipes VALUES ('event_id', {ID_RECIPE_VERSION});
""",
    # What is known of a file that may be gone one day (see `records.StoredFile`). Of those that schema 1 left behind
    # only the last one of each log may have had more to read: for the others nobody shall be alarmed.
    """
ALTER TABLE files ADD COLUMN compressed INTEGER NOT NULL DEFAULT 0;
ALTER TABLE files ADD COLUMN seen_bytes INTEGER;
ALTER TABLE files ADD COLUMN seen_at REAL NOT NULL DEFAULT 0;
ALTER TABLE files ADD COLUMN stamp_bytes INTEGER;
ALTER TABLE files ADD COLUMN stamp_mtime_ns INTEGER;
UPDATE files SET seen_at = strftime('%s', 'now');
UPDATE files SET seen_bytes = position
    WHERE file_id NOT IN (SELECT MAX(file_id) FROM files WHERE inode IS NOT NULL GROUP BY path);
CREATE TABLE gaps (
    file_id INTEGER PRIMARY KEY,
    path TEXT NOT NULL,
    start_offset INTEGER NOT NULL, end_offset INTEGER,   -- NULL: nobody knows how much it was
    reason TEXT NOT NULL, found_at REAL NOT NULL
);
ALTER TABLE recipes RENAME TO facts;
ALTER TABLE facts RENAME COLUMN version TO value;
""",
    # Dead letters that can be listed, bounded and retried. `wanted_at`: a person asked to try it again. What was
    # committed before had been acknowledged to the last event.
    """
ALTER TABLE dead_letters ADD COLUMN kind TEXT NOT NULL DEFAULT 'line';
ALTER TABLE dead_letters ADD COLUMN subject TEXT;
ALTER TABLE dead_letters ADD COLUMN event_type TEXT;
ALTER TABLE dead_letters ADD COLUMN event_id TEXT;
ALTER TABLE dead_letters ADD COLUMN entry_hash TEXT;
ALTER TABLE dead_letters ADD COLUMN is_cut INTEGER NOT NULL DEFAULT 0;
ALTER TABLE dead_letters ADD COLUMN tries INTEGER NOT NULL DEFAULT 0;
ALTER TABLE dead_letters ADD COLUMN wanted_at REAL;
CREATE INDEX wanted_dead_letters ON dead_letters (dead_letter_id) WHERE wanted_at IS NOT NULL;
INSERT INTO facts SELECT 'dead_letter_bytes', ifnull(SUM(length(line)), 0) FROM dead_letters;
CREATE TRIGGER dead_letter_kept AFTER INSERT ON dead_letters BEGIN
    UPDATE facts SET value = value + length(new.line) WHERE name = 'dead_letter_bytes'; END;
CREATE TRIGGER dead_letter_gone AFTER DELETE ON dead_letters BEGIN
    UPDATE facts SET value = value - length(old.line) WHERE name = 'dead_letter_bytes'; END;
CREATE TRIGGER dead_letter_cut AFTER UPDATE OF line ON dead_letters BEGIN
    UPDATE facts SET value = value + length(new.line) - length(old.line) WHERE name = 'dead_letter_bytes'; END;
INSERT INTO books SELECT file_id, 'events.acknowledged', count FROM books WHERE name = 'events';
""",
    # What `replay` delivers is known beside what `run` reads (see `records.StoredFile`). Where reading began was not
    # recorded before: what is before a position then counts as delivered, so that nothing is billed twice.
    """
ALTER TABLE files ADD COLUMN begin_offset INTEGER NOT NULL DEFAULT 0;
ALTER TABLE files ADD COLUMN origin TEXT NOT NULL DEFAULT 'run';
ALTER TABLE files ADD COLUMN scope TEXT;
ALTER TABLE files ADD COLUMN replaying INTEGER;
CREATE INDEX files_by_head ON files (head_hash);
""",
)
SCHEMA_VERSION = len(MIGRATIONS)
