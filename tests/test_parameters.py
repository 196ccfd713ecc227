"""A wrong notebook parameter stops the notebook at once, with what is allowed; a right one passes."""

from __future__ import annotations

import argparse
from pathlib import Path

import nbformat
import papermill
import parameters as notebook
import pytest
from parameters import RULES, check_parameters, optional, output_file, output_folder

GOOD = {
    "dataset": "prototypes",
    "seed": 0,
    "checkpoint": "prototypes",
    "n_structures": None,
    "n_samples": 20,
    "n_steps": 10,
    "n_updates": None,
    "n_processes": 2,
    "minutes": 0.5,
    "resume": True,
    "output_dir": "runs",
}


def test_right_parameters_are_returned_for_the_record():
    assert check_parameters(GOOD, *GOOD) == GOOD


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("dataset", "perov", "one of prototypes, perov5, mp20, mpts52, carbon24, mp"),
        ("dataset", 5, "one of prototypes"),
        ("seed", -1, "an integer ≥ 0"),
        ("seed", True, "an integer ≥ 0"),
        ("seed", 1.0, "an integer ≥ 0"),
        ("n_steps", 0, "an integer ≥ 1, or None"),
        ("n_structures", "10", "an integer ≥ 1, or None"),
        ("n_samples", None, "an integer ≥ 1"),
        ("n_updates", -5, "an integer ≥ 1, or None"),
        ("n_processes", 0, "an integer ≥ 1"),
        ("minutes", 0, "minutes > 0, or None"),
        ("minutes", float("nan"), "minutes > 0, or None"),
        ("minutes", float("inf"), "minutes > 0, or None"),
        ("resume", 1, "type bool"),
        ("checkpoint", None, "a file that exists"),
        ("checkpoint", "nowhere.safetensors", "a file that exists"),
        ("checkpoint", 3, "a file that exists"),
        ("output_dir", "", "a folder"),
        ("output_dir", None, "a folder"),
        ("output_dir", __file__, "a folder"),
    ],
)
def test_wrong_value_is_named_with_what_is_allowed_in_one_line(name, value, message):
    with pytest.raises(ValueError, match=message) as error:
        check_parameters(GOOD | {name: value}, *GOOD)
    assert str(error.value).startswith(f"{name}={value!r}, expected")
    assert "\n" not in str(error.value)


def test_unknown_parameter_is_named_with_those_there_are():
    with pytest.raises(ValueError, match=r"^unknown parameter 'n_step', expected any of dataset, seed, .*n_steps"):
        check_parameters(GOOD | {"n_step": 3}, *GOOD)


def test_missing_parameter_is_named():
    with pytest.raises(ValueError, match="'seed' is missing"):
        check_parameters({"dataset": "perov5"}, "dataset", "seed")


def test_name_without_a_shared_rule_must_be_declared():
    with pytest.raises(ValueError, match="'cutoff', expected any of dataset"):
        check_parameters({"cutoff": 3.0}, "cutoff")


def test_checkpoint_may_be_a_file_or_the_name_of_a_bundled_one(tmp_path, monkeypatch):
    monkeypatch.setattr(notebook, "CHECKPOINTS", tmp_path)
    (tmp_path / "perov5.safetensors").touch()
    for value in ("perov5", str(tmp_path / "perov5.safetensors")):
        assert check_parameters({"checkpoint": value}, "checkpoint") == {"checkpoint": value}
    with pytest.raises(ValueError, match=r"bundled checkpoint \(perov5\)"):
        check_parameters({"checkpoint": "mp20"}, "checkpoint")


def test_declared_rules_take_values_types_and_functions():
    rules = {"device": ("cpu", "cuda"), "cutoff": float, "even": lambda value: "an even number" if value % 2 else None}
    right = {"device": "cpu", "cutoff": 3, "even": 2}
    assert check_parameters(right, **rules) == right
    for wrong, message in (
        ({"device": "tpu"}, "cpu, cuda"),
        ({"cutoff": "3"}, "type float"),
        ({"even": 3}, "an even number"),
    ):
        with pytest.raises(ValueError, match=message):
            check_parameters(right | wrong, **rules)


def test_optional_allows_none_and_nothing_else():
    rules = {"checkpoint": optional(RULES["checkpoint"]), "device": optional(("cpu", "cuda"))}
    nothing = {"checkpoint": None, "device": None}
    assert check_parameters(nothing, **rules) == nothing
    with pytest.raises(ValueError, match=r"device='tpu', expected one of cpu, cuda, or None$"):
        check_parameters(nothing | {"device": "tpu"}, **rules)


def test_output_folder_is_made_where_asked(tmp_path, monkeypatch):
    monkeypatch.delenv("CONTSP_OUTPUT_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    assert output_folder("a/b") == Path("a/b")
    assert (tmp_path / "a" / "b").is_dir()
    assert output_folder(str(tmp_path / "c")) == tmp_path / "c"


@pytest.mark.parametrize("output_dir", ["../../figures", "figures", "/figures", Path("figures")])
def test_output_folder_stays_inside_the_folder_of_the_variable(tmp_path, monkeypatch, output_dir):
    monkeypatch.setenv("CONTSP_OUTPUT_DIR", str(tmp_path / "elsewhere"))
    assert output_folder(output_dir) == tmp_path / "elsewhere" / "figures"
    assert (tmp_path / "elsewhere" / "figures").is_dir()


def test_a_script_knows_before_its_work_that_it_can_write(tmp_path):
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=output_file(".csv", ".npz"))
    assert parser.parse_args(["--output", str(tmp_path / "new" / "a.csv")]).output.parent.is_dir()
    (tmp_path / "b.csv").mkdir()
    (tmp_path / "file").touch()
    for wrong in ("a.txt", "a", str(tmp_path / "b.csv"), str(tmp_path / "file" / "a.csv")):
        with pytest.raises(SystemExit):
            parser.parse_args(["--output", wrong])


@pytest.fixture(scope="module")
def small_notebook(tmp_path_factory):
    """A notebook with one parameters cell and its check."""
    cells = [
        nbformat.v4.new_code_cell("seed = 0\nn_steps = 5", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(
            "from parameters import check_parameters\ncheck_parameters(globals(), 'seed', 'n_steps')"
        ),
        nbformat.v4.new_code_cell("later = 3  # a name of the notebook's own is no parameter"),
    ]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    path = tmp_path_factory.mktemp("notebook") / "small.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), path)
    return path


# papermill opens an event loop and sockets that Python 3.11 reports as left open
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore:.*Proactor.*")
@pytest.mark.parametrize(
    ("parameters", "message"),
    [({"n_steps": 7}, None), ({"n_steps": 7, "steps": 7}, "unknown parameter 'steps'")],
)
def test_papermill_run_stops_on_a_wrong_parameter(small_notebook, tmp_path, parameters, message):
    folder = Path(notebook.__file__).parent
    arguments = {"parameters": parameters, "cwd": folder, "progress_bar": False, "log_output": False}
    if message is None:
        papermill.execute_notebook(str(small_notebook), str(tmp_path / "out.ipynb"), **arguments)
        return
    with pytest.raises(papermill.PapermillExecutionError, match=message):
        papermill.execute_notebook(str(small_notebook), str(tmp_path / "out.ipynb"), **arguments)
