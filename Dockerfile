# Two stages: the wheel and its dependencies are built where compilers may be needed, and run where they are not.
# Python 3.11 is what CI tests with.
FROM python:3.11-slim AS build
WORKDIR /build
COPY pyproject.toml README.md LICENSE ./
COPY metershipper metershipper
RUN python -m venv /opt/metershipper && /opt/metershipper/bin/pip install --no-cache-dir .

FROM python:3.11-slim
COPY --from=build /opt/metershipper /opt/metershipper
# The state belongs to one unprivileged user; the log of Kong is mounted read-only and must be readable by it.
RUN useradd --system --uid 10001 --no-create-home metershipper \
 && install -d -m 0700 -o metershipper -g metershipper /var/lib/metershipper
USER metershipper
ENV PATH=/opt/metershipper/bin:$PATH METERSHIPPER_CONFIG=/etc/metershipper/config.toml PYTHONUNBUFFERED=1
VOLUME /var/lib/metershipper
STOPSIGNAL SIGTERM
ENTRYPOINT ["metershipper"]
CMD ["run"]
