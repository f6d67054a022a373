"""The documentation builds as a site without a warning, and loads nothing from elsewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_site(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {path.relative_to(tmp_path).as_posix(): path.read_text("utf-8") for path in tmp_path.rglob("*.html")}
    assert "batch_advantages" in pages["api/estimator/index.html"]
    method = pages["method/index.html"]
    assert "<math" in method
    assert "arithmatex" not in method
    assert 'src="docs/' not in pages["index.html"]
    for name, text in pages.items():
        loaded = re.findall(r'(?:<script[^>]* src|<link[^>]* rel="stylesheet"[^>]* href|<img[^>]* src)="([^"]*)"', text)
        assert not [url for url in loaded if url.startswith(("http", "//"))], name
