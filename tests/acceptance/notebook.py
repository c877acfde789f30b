"""Runs a notebook in a Jupyter kernel that trains, generates, scores and shows; writes it as HTML.

python tests/acceptance/notebook.py OUT.html

Needs `pip install ipykernel nbclient nbconvert pandas` beside lmcli. Fails if a cell does, if a
result is not drawn as HTML, or if a command moves the cursor, which a notebook cannot do.
"""

import re
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbconvert import HTMLExporter

STORIES = Path(__file__).resolve().parents[2] / "data" / "stories.txt"
COMMANDS = (
    f"!{sys.executable} -m lmcli train {STORIES} --preset tiny --time 20s -o runs/first",
    f"!{sys.executable} -m lmcli score -m runs/first --per word --color <<< 'A tax auditor.'",
)
RESULTS = (
    "import lmcli\nrun = lmcli.Run('runs/first')\nrun",
    "lm = run.model()\nlm",
    "lm.generate('Once upon a time', max_new_tokens=40, seed=1)",
    "texts = (text for text in ['A tax auditor.', '\u0645\u0631\u062d\u0628\u0627'])\n"
    "scores = lm.score(texts, per='word')\nscores",
    "scores.to_pandas()",
    "lm.score([f'Line {i}.' for i in range(20000)])",
    "run.metrics",
    "lm.perplexity('Once upon a time there was a tax auditor.')",
)


def main(page: Path) -> None:
    """Runs the cells, checks what they show and writes the page."""
    notebook = nbformat.v4.new_notebook(cells=list(map(nbformat.v4.new_code_cell, COMMANDS)))
    notebook.cells += map(nbformat.v4.new_code_cell, RESULTS)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=600, resources={"metadata": {"path": folder}}).execute()
    for cell in notebook.cells[: len(COMMANDS)]:
        text = "".join(output.text for output in cell.outputs)
        assert "runs/first" in text or "auditor" in text, text
        assert not re.search(r"\x1b\[\d*[A-HJK]", text), text
    for cell in notebook.cells[len(COMMANDS) :]:
        (result,) = [each for each in cell.outputs if each.output_type == "execute_result"]
        assert result.data["text/html"], cell.source
    page.write_text(HTMLExporter().from_notebook_node(notebook)[0], encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
