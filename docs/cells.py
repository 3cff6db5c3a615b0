"""Notebooks without Jupyter: `python docs/cells.py docs/notebooks/*.ipynb` runs them, in place.

The site has them as pages, see `.mkdocs.yml`; `tests/test_docs.py` runs their code.
"""

import contextlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path


def run(path: Path) -> None:
    """Run the cells one after the other in an empty folder, and keep what they print."""
    notebook, names = json.loads(path.read_text()), {}
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for number, cell in enumerate(
            (x for x in notebook["cells"] if x["cell_type"] == "code"), start=1
        ):
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec("".join(cell["source"]), names)
            lines = printed.getvalue().splitlines(keepends=True)
            stream = {"name": "stdout", "output_type": "stream", "text": lines}
            cell["outputs"], cell["execution_count"] = [stream] if lines else [], number
    path.write_text(json.dumps(notebook, indent=1) + "\n")


def page(path: Path) -> str:
    """Return a notebook as Markdown."""
    parts = []
    for cell in json.loads(path.read_text())["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        for output in cell.get("outputs", ()):
            parts.append(f"```text\n{''.join(output['text']).rstrip()}\n```")
    parts.insert(1, f"[The notebook]({path.name})")
    return "\n\n".join(parts) + "\n"


def on_files(files, *, config):
    """Add a page for each notebook; called by mkdocs."""
    from mkdocs.structure.files import File

    for path in sorted(Path(config["docs_dir"]).glob("notebooks/*.ipynb")):
        name = path.relative_to(config["docs_dir"])
        file = File.generated(config, str(name.with_suffix(".md")), content=page(path))
        file.edit_uri = str(name)
        files.append(file)
    return files


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    for argument in sys.argv[1:]:
        run(Path(argument).resolve())
