"""Models and reports for the tests of this folder."""

from support.measured_models import original, quantized, report

__all__ = ["original", "quantized", "report"]
