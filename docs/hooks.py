"""Hooks of the documentation's build: the measured results, which lie outside docs/, become part of the site.

The pages link to them as they lie in the repository (`../benchmarks/results/...`), so that the links work there, too.
"""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add every file of benchmarks/results to the site, below results/."""
    for path in sorted(RESULTS.rglob("*")):
        if path.is_file():
            uri = f"results/{path.relative_to(RESULTS).as_posix()}"
            files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links into benchmarks/results point to where `on_files` puts them."""
    return markdown.replace("](../benchmarks/results/", "](results/")
