"""Fuzz the recipe loader, led by coverage: whatever a file or an override holds, it is a recipe or a RecipeError.

    python tests/fuzz_recipe.py --runs 1000000            # needs `pip install atheris`; a minute or several

The inputs are the bytes of a recipe file, after a line of overrides now and then. What is read is also written out and
read again. The loader and the YAML reader below it are instrumented, nothing else is.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

WORDS = (
    *(
        "name: ",
        "title: ",
        "task: causal-lm\n",
        "data:\n  restricted: ",
        "dataset: ",
        "columns: {",
        "where: {",
        "uses: [",
    ),
    *("defense: {name: ctrap", "train: {steps: 1, batch_size: 2, lr: 1e-4}", "probe: {", "rates: {full: [", "erase: "),
    *(
        "adapter: {r: 1, alpha: 2}",
        "card: {",
        "&a ",
        "*a",
        "!!python/name:os",
        "<<: ",
        "1e999",
        ".nan",
        "{prompt}",
        "|\n ",
    ),
    *(
        "--set ",
        "=",
        "~",
        "null",
        "0.",
        "---\n",
        "\t",
        "\u2028",
        "\ufeff",
        "../",
        "https://",
        "paper: {title: t, url: u}",
    ),
)
"""What a recipe is made of, for the fuzzer to put together."""


def corpus(folder: Path) -> Path:
    """The shipped recipes, and a small one, as where to begin."""
    from hardener.resources import recipes

    folder.mkdir()
    for name, path in recipes().items():
        (folder / name).write_bytes(b"\n" + path.read_bytes())
    small = "name: x\ntitle: t\ntask: causal-lm\ndata: {restricted: {dataset: x}, retain: {dataset: y}}\n"
    (folder / "small").write_text("probe.steps=3\n" + small)
    (folder / "words").write_text("\n" + "".join(WORDS))
    return folder


def load(data: bytes, path: Path) -> None:
    """One input: a line of overrides, then the file. Anything but a recipe or a RecipeError is a finding."""
    from hardener import recipe_file
    from hardener.errors import RecipeError

    line, _, text = data.partition(b"\n")
    overrides = [one for one in line.decode("utf-8", "replace").split("\x1f") if one]
    path.write_bytes(text)
    try:
        recipe = recipe_file.load(path, overrides)
    except RecipeError:
        return
    path.write_text(recipe_file.dump(recipe), encoding="utf-8")
    assert recipe_file.load(path) == recipe


def main() -> None:
    """Fuzz until so many executions are done; a finding ends it with its input and the traceback."""
    import atheris

    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--runs", type=int, default=1_000_000, help="executions")
    asked.add_argument("--length", type=int, default=600, help="bytes per input at most")
    asked.add_argument("--seed", type=int, default=1)
    chosen = asked.parse_args()
    modules = ["hardener.recipe_file", "hardener.strict_yaml", "hardener.problems", "hardener.contradictions"]
    with atheris.instrument_imports(include=modules):
        import hardener.recipe_file  # noqa: F401 - instrumented while it is imported
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as place:
        path, words = Path(place) / "recipe.yaml", Path(place) / "words"
        quoted = (one.encode().decode("latin-1").encode("unicode_escape").decode().replace('"', '\\"') for one in WORDS)
        words.write_text("".join(f'"{one}"\n' for one in quoted).replace("\\n", "\\x0A").replace("\\t", "\\x09"))
        limits = [f"-runs={chosen.runs}", f"-max_len={chosen.length}", f"-seed={chosen.seed}", "-timeout=20"]
        folder = corpus(Path(place) / "corpus")
        atheris.Setup([sys.argv[0], *limits, f"-dict={words}", str(folder)], lambda data: load(data, path))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
