"""A headless Chromium for tests, and what is skipped without one."""

import os
import shutil

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("/usr/bin/chromium", "chromium", "google-chrome"))), None)
PATIENCE = 60  # seconds, for any one thing to happen on a busy machine
BROWSER_MARKS = [
    pytest.mark.exact("starts programs, which are not reached"),
    pytest.mark.browser,
    pytest.mark.skipif(
        CHROMIUM is None and not os.environ.get("MINIMOE_REQUIRE_BROWSER"),
        reason="no chromium and no google-chrome on this machine",
    ),
]
