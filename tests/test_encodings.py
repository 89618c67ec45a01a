"""No file is opened in the encoding of the machine: what one computer writes, every other reads.

Nothing is run for it: `make test` sets PYTHONWARNDEFAULTENCODING=1, and with the filters of pyproject.toml every test
fails in which a module of ours opens a file without an encoding. Here it is seen that they do.
"""

import sys

import pytest

pytestmark = [
    pytest.mark.exact("computes nothing"),
    pytest.mark.skipif(not sys.flags.warn_default_encoding, reason="PYTHONWARNDEFAULTENCODING=1 is not set"),
]


def test_a_missing_encoding_is_an_error_in_modules_of_ours():
    for module in ("minimoe.example", "workshop.example", "tests.example", "benchmarks.example"):
        with pytest.raises(EncodingWarning, match="'encoding' argument not specified"):
            exec("open('README.md').close()", {"__name__": module})
    with pytest.raises(EncodingWarning):
        exec("import subprocess; subprocess.run(['true'], text=True)", {"__name__": "minimoe.example"})
