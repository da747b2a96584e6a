"""Loading an evaluator by the name a user gives it."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

from eval_protocol_rft.scoring._evaluator import EvaluatorError
from eval_protocol_rft.scoring.executors._loading import EvaluatorNotFoundError, load_evaluator

HEADER = """\
from eval_protocol.models import EvaluationRow
from eval_protocol.pytest import evaluation_test
from eval_protocol_rft.scoring import score_each_completion
from tests.scored_rows import Canned, asked

OPTIONS = dict(
    input_rows=[[asked()]],
    completion_params=[{"model": "m"}],
    rollout_processor=Canned({}),
)

"""


@pytest.fixture(autouse=True)
def _imports_are_undone(monkeypatch):
    """Each test has the same file names; what it imports and puts on the path is its own."""
    before = set(sys.modules)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None) or ""
        if "site-packages" not in file and "eval_protocol_rft" not in file:
            del sys.modules[name]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """An empty folder, and the current one; call it to write files there."""
    monkeypatch.chdir(tmp_path)

    def write(**files: str) -> Path:
        for name, text in files.items():
            file = tmp_path / (name.replace("__in__", "/") + ".py")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(dedent(text))
        return tmp_path

    return write


def test_a_function_of_a_file_is_loaded_with_what_is_known_of_it(project):
    folder = project(judges="def right(row):\n    return 1.0\n")
    loaded = load_evaluator("judges.py::right")
    assert loaded.spec == f"{folder}/judges.py::right"
    assert loaded.name == "judges.py::right"
    assert loaded.function(row=None) == 1.0
    assert (loaded.mode, loaded.is_async, loaded.kwargs) == ("pointwise", False, {})
    assert loaded.dataset_adapter is None
    assert loaded.fingerprint == hashlib.sha256((folder / "judges.py").read_bytes()).hexdigest()


def test_a_function_of_a_module_is_found_from_the_current_folder(project):
    project(
        pkg__in____init__="",
        pkg__in__judges="from pkg.parts import SCORE\nasync def right(row):\n    return SCORE\n",
        pkg__in__parts="SCORE = 0.5\n",
    )
    loaded = load_evaluator("pkg.judges:right")
    assert loaded.spec == loaded.name == "pkg.judges:right"
    assert loaded.is_async
    assert loaded.function.__module__ == "pkg.judges"


def test_a_file_sees_its_neighbours_and_in_a_package_is_named_from_the_top(project):
    project(
        suite__in__test_flat="from helper import SCORE\ndef f(row):\n    return SCORE\n",
        suite__in__helper="SCORE = 0.25\n",
        top__in__pkg__in____init__="",
        top__in__pkg__in__sub__in____init__="",
        top__in__pkg__in__sub__in__test_deep=(
            "from ..helper import SCORE\ndef f(row):\n    return SCORE\n"
        ),
        top__in__pkg__in__helper="SCORE = 0.75\n",
    )
    assert load_evaluator("suite/test_flat.py::f").function(None) == 0.25
    deep = load_evaluator("top/pkg/sub/test_deep.py::f")
    assert deep.function(None) == 0.75
    assert deep.function.__module__ == "pkg.sub.test_deep"


def test_the_resolved_spec_loads_the_same_evaluator_from_another_folder(project, tmp_path):
    project(judges="def right(row):\n    return 1.0\n")
    loaded = load_evaluator("judges.py::right")
    code = (
        "import sys; from eval_protocol_rft.scoring.executors._loading import load_evaluator; "
        "print(load_evaluator(sys.argv[1]).fingerprint)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, loaded.spec],
        cwd=os.path.sep, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == loaded.fingerprint


def test_an_evaluation_test_brings_its_mode_arguments_and_adapter(project):
    tests = """
        def adapt(rows):
            return [asked()]

        @evaluation_test(mode="all", **OPTIONS)
        async def test_all(rows: list[EvaluationRow]) -> list[EvaluationRow]: ...

        @evaluation_test(evaluation_test_kwargs=[{"right": "2"}], dataset_adapter=adapt, **OPTIONS)
        @score_each_completion
        def test_one(row: EvaluationRow, right: str) -> EvaluationRow: ...
        """
    project(judges=HEADER + dedent(tests))
    both = load_evaluator("judges.py::test_all")
    assert (both.mode, both.is_async, both.dataset_adapter) == ("all", True, None)
    one = load_evaluator("judges.py::test_one")
    assert (one.mode, one.is_async, one.kwargs) == ("pointwise", False, {"right": "2"})
    assert one.dataset_adapter is sys.modules["judges"].adapt


def test_the_fingerprint_tells_that_the_file_changed(project):
    project(judges="def f(row):\n    return 1.0\n")
    before = load_evaluator("judges.py::f").fingerprint
    assert load_evaluator("judges:f").fingerprint == before
    project(judges="def f(row):\n    return 1.5\n")
    assert load_evaluator("judges.py::f").fingerprint != before


@pytest.mark.parametrize("spec", ["", "judges", "judges:", ":f", "judges.f"])
def test_a_spec_of_neither_form_says_which_forms_there_are(project, spec):
    with pytest.raises(EvaluatorNotFoundError, match=r"file\.py::function or package\.module:fu"):
        load_evaluator(spec)


def test_a_missing_file_is_named_in_full(project, tmp_path):
    with pytest.raises(EvaluatorNotFoundError) as caught:
        load_evaluator("sub/judges.py::f")
    assert str(caught.value) == f"sub/judges.py::f: there is no file {tmp_path}/sub/judges.py"


def test_one_colon_after_a_file_will_do(project):
    folder = project(judges="def f(row):\n    return 1.0\n")
    assert load_evaluator("judges.py:f").spec == f"{folder}/judges.py::f"
    with pytest.raises(EvaluatorNotFoundError, match=r"a file ends in \.py: sub/judges\.py::f"):
        load_evaluator("sub/judges:f")


def test_a_method_is_no_function_of_a_module(project):
    project(judges="class A:\n    def f(self, row): ...\n")
    with pytest.raises(EvaluatorNotFoundError, match="'A::f' is not the name of a function"):
        load_evaluator("judges.py::A::f")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("x = 1\n1 / 0\n", "ZeroDivisionError: division by zero ({}/judges.py:2)"),
        ("x = (\n", "SyntaxError: '(' was never closed ({}/judges.py:1)"),
        ("import gone\n", "ModuleNotFoundError: No module named 'gone' ({}/judges.py:1)"),
        ("import json\njson.loads('{')\n", "({}/judges.py:2)"),
        ("raise SystemExit(3)\n", "SystemExit: 3 ({}/judges.py:1)"),
        ("import pytest\npytest.importorskip('gone')\n", "could not import 'gone'"),
    ],
)
def test_an_import_that_raises_says_what_and_where(project, tmp_path, text, told):
    project(judges=text)
    with pytest.raises(EvaluatorNotFoundError) as caught:
        load_evaluator("judges.py::f")
    assert str(caught.value).startswith("judges.py::f: importing judges failed: ")
    assert told.format(tmp_path) in str(caught.value)


def test_a_missing_module_is_an_error_without_a_place(project):
    with pytest.raises(EvaluatorNotFoundError, match=r"No module named 'nowhere'$"):
        load_evaluator("nowhere.judges:f")


def test_a_missing_function_comes_with_a_list_of_what_is_there(project):
    project(
        judges="""
        from json import dumps
        def one(row): ...
        def many(rows): ...
        def helper(text): ...
        ROW = 1
        """
    )
    with pytest.raises(EvaluatorNotFoundError) as caught:
        load_evaluator("judges.py::won")
    assert str(caught.value) == (
        "judges.py::won: judges has no function 'won'; evaluators there: many, one"
    )
    project(others="x = 1\n")
    with pytest.raises(EvaluatorNotFoundError, match="it has no evaluators"):
        load_evaluator("others.py::f")


def test_a_name_that_is_no_function_is_refused(project):
    project(judges="ROW = 1\n")
    with pytest.raises(EvaluatorNotFoundError, match="ROW is of type int, not a function"):
        load_evaluator("judges.py::ROW")


def test_a_module_name_that_is_taken_is_not_mistaken_for_the_file(project):
    project(a__in__judges="def f(row): ...\n", b__in__judges="def f(row): ...\n")
    load_evaluator("a/judges.py::f")
    with pytest.raises(EvaluatorNotFoundError, match=r"name judges already belongs to .*a/judges"):
        load_evaluator("b/judges.py::f")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("def f(sample): ...\n", "must have one parameter named `row`"),
        ("def f(rows): ...\n", "needs mode='groupwise' or mode='all'"),
        ("def f(row, judge): ...\n", r"and its arguments \(none\): missing .* 'judge'"),
        ("class f:\n    def __call__(self, row): ...\nf = f()\n", "not a Python function"),
        (
            HEADER
            + "@evaluation_test(evaluation_test_kwargs=[{'a': 1}, {'a': 2}], **OPTIONS)\n"
            + "def f(row: EvaluationRow, a: int) -> EvaluationRow: ...\n",
            "2 sets of evaluation_test_kwargs",
        ),
    ],
)
def test_a_function_that_is_no_evaluator_is_refused_by_name(project, text, told):
    project(judges=text)
    with pytest.raises(EvaluatorError, match=rf"^judges\.py::f: .*{told}"):
        load_evaluator("judges.py::f")


def test_an_edit_outdates_the_evaluators_that_it_concerns_and_no_others(project):
    source = """
        import json
        from parts import SCORE

        LIMIT = 3

        def cut(text):
            return text[:LIMIT]

        def short(row):
            return float(len(cut(row)))

        def other(row):
            return SCORE
        """
    project(judged=source, parts="SCORE = 1.0\n")
    file = Path("judged.py")
    text = file.read_text()

    def code(name: str) -> dict[str, str]:
        return dict(load_evaluator(f"judged.py::{name}").code)

    short, other = code("short"), code("other")
    assert (set(short), set(other)) == ({"judged.py"}, {"judged.py", "parts.py"})
    file.write_text(text.replace("LIMIT = 3", "LIMIT = 4  # longer"))
    assert code("short")["judged.py"] != short["judged.py"]
    assert code("other") == other
    file.write_text("# by hand\n" + text.replace("return SCORE", "return SCORE + 1"))
    assert code("short") == short
    assert code("other")["judged.py"] != other["judged.py"]
    file.write_text(text + "\njson.loads = None\n")
    assert code("short") != short
    file.write_text(text)
    Path("parts.py").write_text("SCORE = 2.0\n")
    assert code("short") == short
    assert code("other")["parts.py"] != other["parts.py"]
    assert code("other")["judged.py"] == other["judged.py"]


def test_what_an_evaluation_test_rolls_out_does_not_outdate_its_scores(project):
    source = HEADER + dedent("""
        @evaluation_test(num_runs=1, evaluation_test_kwargs=[{"right": "2"}], **OPTIONS)
        def test_one(row: EvaluationRow, right: str) -> EvaluationRow: ...
        """)
    project(judged_test=source)
    before = load_evaluator("judged_test.py::test_one").code
    project(judged_test=source.replace("num_runs=1", "num_runs=4"))
    assert load_evaluator("judged_test.py::test_one").code == before
    project(judged_test=source.replace('"right": "2"', '"right": "3"'))
    assert load_evaluator("judged_test.py::test_one").code != before


def test_a_script_that_scores_with_its_own_evaluator_is_told_to_guard_that(project):
    project(
        script="""
        from eval_protocol_rft.scoring.executors import load_evaluator

        def judge(row):
            return 1.0

        load_evaluator("script.py::judge")
        """
    )
    with pytest.raises(EvaluatorNotFoundError, match="belongs under `if __name__ == '__main__':`"):
        load_evaluator("script.py::judge")
