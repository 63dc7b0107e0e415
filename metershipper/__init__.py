"""metershipper turns Kong gateway access logs into usage events for OpenMeter: nothing lost, nothing billed twice."""

__version__ = "0.1.0"
