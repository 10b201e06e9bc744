import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and alarm")
@pytest.mark.parametrize("script", ["fuzz_checkpoints.py", "fuzz_images.py"])
def test_a_few_hundred_damaged_files_do_no_harm(script):
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / script, "--count", "300"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
