"""What `make docs` does beside mkdocs (mkdocs.yml): the pages of the top folder, links to files, and formulas."""

import re
from html import unescape
from pathlib import Path
from posixpath import normpath, relpath

from latex2mathml.converter import convert
from mkdocs.structure.files import File

TOP = Path(__file__).parents[1]
PAGES = ("README.md", "BENCHMARKS.md", "CONTRIBUTING.md", "LOG.md", "CHANGELOG.md")
LINK = re.compile(r"\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.S)


def on_files(files, config):
    """Take the top folder's pages into the site."""
    for name in PAGES:
        files.append(File.generated(config, name, content=(TOP / name).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown, page, config, files):
    """Turn links between files of the repository into links between pages; a link to another file becomes its text."""
    source = page.file.src_uri
    folder = "" if source in PAGES else "docs/"

    def link(found):
        target = found[2]
        if "://" in target:
            return found[0]
        path = normpath(f"{Path(folder + source).parent.as_posix()}/{target}")
        path = path.removeprefix("docs/") if path not in PAGES else path
        path = "studies/README.md" if path == "studies" else path
        if files.get_file_from_path(path) is None:
            return found[1] if (TOP / path).exists() else found[0]  # what is nowhere is left for mkdocs to refuse
        return f"[{found[1]}]({relpath(path, Path(source).parent.as_posix())}{found[3] or ''})"

    return LINK.sub(link, markdown)


def on_page_content(html, page, config, files):
    """Write formulas as MathML, which needs no script."""
    return FORMULA.sub(
        lambda found: convert(unescape(found[2]), display="block" if found[1] == "div" else "inline"), html
    )
