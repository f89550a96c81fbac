"""Run the tutorials, and write their pages and notebooks.

    python docs/make_tutorials.py run text_classification     # measures, and keeps the results
    python docs/make_tutorials.py run --quick [NAME ...]      # shows that they run; all of them if none is named
    python docs/make_tutorials.py write                       # the pages and the notebooks

A tutorial is a script in `examples/tutorials`, in the percent format of jupytext. The quick form differs in two things:
`epochs = 3  # quick: 1` has the other value, and a statement that ends with `# quick: skip` is left out. A script ends with
the dict `numbers`, what it measured. Results are in `docs/tutorials/results`, pages in `docs/tutorials`, notebooks beside
the scripts. A result is kept with a hash of the code that gave it; `write` refuses results of other code.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import hashlib
import io
import json
import linecache
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jupytext

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS, PAGES = ROOT / "examples" / "tutorials", ROOT / "docs" / "tutorials"
RESULTS = PAGES / "results"
REPOSITORY = "https://github.com/keras-lora/keras_lora/blob/main"
BACKENDS = {"jax": "JAX", "tensorflow": "TensorFlow", "torch": "PyTorch"}
#: In the order of the navigation.
NAMES = ["text_classification", "image_classification", "language_model", "text_generation", "tabular", "dna"]
NAMES += [
    "callbacks",
    "custom_training_loop",
    "hyperparameter_search",
    "rank_and_plots",
    "preferences",
    "many_adapters",
    "export",
]
NAMES += ["peft_adapter"]


def notebook_of(name: str) -> Any:
    """The script as a notebook, still with the comments about its quick form."""
    notebook = jupytext.reads((SCRIPTS / f"{name}.py").read_text(encoding="utf-8"), fmt="py:percent")
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    for number, cell in enumerate(notebook.cells):
        cell.id = str(number)
    return notebook


def quick_form(source: str) -> str:
    """The code that only shows that the tutorial runs."""
    lines = source.splitlines()
    statements = [each for each in ast.walk(ast.parse(source)) if isinstance(each, ast.stmt) and not hasattr(each, "body")]
    ends = {each.end_lineno or each.lineno: each.lineno for each in statements}
    for end, start in ends.items():
        if lines[end - 1].endswith("# quick: skip"):
            lines[start - 1 : end] = [""] * (end - start + 1)
    return "\n".join(re.sub(r"^(\s*\w+ = ).*  # quick: (.*)$", r"\1\2", line) for line in lines)


def full_form(source: str) -> str:
    """The code as a reader sees it."""
    return re.sub(r"  # quick: .*$", "", source, flags=re.MULTILINE)


def code_hash(notebook: Any) -> str:
    """Changes if the code changes; text, comments, the layout of lines and the quick form do not count."""
    cells = [ast.parse(full_form(cell.source)) for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\n\n".join(map(ast.dump, cells)).encode()).hexdigest()[:16]


class Tee(io.StringIO):
    """Keeps what is printed, and shows it at once."""

    def write(self, text: str) -> int:
        assert sys.__stdout__ is not None
        sys.__stdout__.write(text)
        sys.__stdout__.flush()
        return super().write(text)


def run(name: str, quick: bool) -> dict[str, Any]:
    """Run the cells in a new folder, and return the numbers and what each cell printed."""
    import keras

    import keras_lora

    notebook, printed = notebook_of(name), []
    names: dict[str, Any] = {"__name__": "__main__"}
    keras.utils.clear_session()  # so that names of layers do not depend on the tutorials before
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for number, cell in enumerate(notebook.cells):
            if cell.cell_type != "code":
                continue
            source = (quick_form if quick else full_form)(cell.source)
            where = f"<{name}, cell {number}>"
            linecache.cache[where] = (len(source), None, source.splitlines(keepends=True), where)  # for tracebacks
            with contextlib.redirect_stdout(Tee()) as output:
                exec(compile(source, where, "exec"), names)
            printed.append(output.getvalue())
    backend = keras.backend.backend()
    versions = {each.__name__: each.__version__ for each in (keras, keras_lora, sys.modules[backend])}
    code = {"code": code_hash(notebook), "date": time.strftime("%Y-%m-%d")}
    return {**code, "backend": backend, "versions": versions, "numbers": names["numbers"], "printed": printed}


def record(name: str, measured: dict[str, Any]) -> None:
    """Enter what a run measured into the file of its results."""
    file = RESULTS / f"{name}.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    results = {key: each for key, each in results.items() if each["code"] == measured["code"]}
    results[measured["backend"]] = measured
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")


def results_of(name: str) -> dict[str, Any]:
    """The results of a tutorial by backend, all of the code that the script has now."""
    code = code_hash(notebook_of(name))
    results = json.loads((RESULTS / f"{name}.json").read_text())
    if old := [backend for backend, each in results.items() if each["code"] != code]:
        raise SystemExit(f"{name}: the code changed since it ran on {', '.join(old)}. Run it again.")
    return results


def table(results: dict[str, Any]) -> str:
    """The numbers by backend, and which versions gave them."""
    rows: dict[str, dict[str, str]] = {}
    for backend, result in results.items():
        for label, number in result["numbers"].items():
            shown = number if isinstance(number, str) else f"{number:,}" if isinstance(number, int) else f"{number:.3g}"
            rows.setdefault(label, {})[backend] = shown
    lines = ["", *(BACKENDS[each] for each in results)], ["---", *["---:"] * len(results)]
    lines += tuple([label, *(row[each] for each in results)] for label, row in rows.items())
    made = [
        " ".join([f"{BACKENDS[backend]}:", *(f"{key} {each}," for key, each in result["versions"].items()), result["date"]])
        for backend, result in results.items()
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + f"\n{'; '.join(made)}.\n"


def without_times(printed: str) -> str:
    """What `fit` prints, without seconds that depend on the machine."""
    return re.sub(r" - \d+m?s(?: - \S+/(?:step|epoch))?", "", printed)


def page_of(name: str) -> str:
    """The text, the code, what it printed, and the numbers."""
    results = results_of(name)
    shown = results.get("jax") or next(iter(results.values()))
    printed = iter(shown["printed"])
    parts = []
    for cell in notebook_of(name).cells:
        if cell.cell_type == "markdown":
            parts.append(f"{cell.source}\n")
            if len(parts) == 1:  # after the title and the introduction
                script, notebook = (f"{REPOSITORY}/examples/tutorials/{name}.{ending}" for ending in ("py", "ipynb"))
                parts.append(f"[Script]({script}) · [Notebook]({notebook})\n")
            continue
        parts.append(f"```python\n{full_form(cell.source)}\n```\n")
        if output := without_times(next(printed)).rstrip():
            parts.append(f"```text\n{output}\n```\n")
    where = f"The printed lines above are from {BACKENDS[shown['backend']]}, without the times."
    parts.append(f"{table(results)}\n{where}\n")
    return "\n".join(parts)


def notebook_text(name: str) -> str:
    """The notebook without outputs, as JSON."""
    notebook = notebook_of(name)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.source = full_form(cell.source)
        else:  # links to pages beside and above this one
            cell.source = re.sub(r"\]\((\w+)\.md\)", r"](\1.ipynb)", cell.source.replace("](../", "](../../docs/"))
    return jupytext.writes(notebook, fmt="ipynb")


def written() -> dict[Path, str]:
    """Every file that `write` writes, with its text."""
    files = {PAGES / f"{name}.md": page_of(name) for name in NAMES}
    return files | {SCRIPTS / f"{name}.ipynb": notebook_text(name) for name in NAMES}


def main() -> None:
    """Run or write, as the command line asks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "write"])
    parser.add_argument("names", nargs="*", metavar="NAME", default=[])
    parser.add_argument("--quick", action="store_true", help="the quick form; nothing is recorded")
    arguments = parser.parse_intermixed_args()
    if unknown := [name for name in arguments.names if not (SCRIPTS / f"{name}.py").exists()]:
        parser.error(f"there is no tutorial {', '.join(unknown)}. There are: {', '.join(NAMES)}.")
    if arguments.what == "write":
        for path, text in written().items():
            path.write_text(text, encoding="utf-8")
        return
    os.environ.setdefault("KERAS_BACKEND", "jax")
    os.environ["COLUMNS"] = "84"  # tables are as wide as the terminal
    sys.path.insert(0, str(SCRIPTS))
    for name in arguments.names or NAMES:
        start = time.process_time()
        measured = run(name, arguments.quick)
        print(f"{name}: {time.process_time() - start:.1f} CPU seconds on {measured['backend']}", flush=True)
        if not arguments.quick:
            record(name, measured)


if __name__ == "__main__":
    main()
