"""The form of the prediction notebook: what its buttons do while the kernel listens."""

from __future__ import annotations

import asyncio
import time

import form
import ipywidgets as widgets
import pytest

from contsp_core import load_model
from contsp_core.app.prediction import PredictConfig, predict
from contsp_core.csp.candidates import space_group
from contsp_core.sampler import training_counts


def parts(widget):
    """A widget and all inside it."""
    return [widget, *(found for child in getattr(widget, "children", ()) for found in parts(child))]


@pytest.fixture
def shown(monkeypatch):
    """Show the form as in a live notebook; all its widgets."""
    displayed = []
    monkeypatch.setattr(form, "is_live", lambda: True)
    monkeypatch.setattr(form, "display", displayed.append)
    monkeypatch.setattr(form, "_viewer", lambda _: widgets.HTML())
    form.show_form("NaCl", "prototypes")
    return parts(displayed[0])


def button(shown, name):
    (found,) = (part for part in shown if isinstance(part, widgets.Button) and part.description == name)
    return found


async def type_late(shown, formula="KBr"):
    """Press Predict before the browser has sent what was typed, and wait for the end."""
    button(shown, "Predict").click()
    await asyncio.sleep(0.1)
    next(part for part in shown if isinstance(part, widgets.Text)).value = formula
    while not button(shown, "Predict").disabled:
        await asyncio.sleep(0.01)
    while button(shown, "Predict").disabled:
        await asyncio.sleep(0.01)


def test_what_was_typed_before_the_button_is_searched_even_if_it_arrives_later(shown, monkeypatch):
    searched = []
    monkeypatch.setattr(form, "predict", lambda _, formula, *rest, **more: searched.append(formula))
    asyncio.run(asyncio.wait_for(type_late(shown), 60))
    assert searched == ["KBr"]


def test_without_a_checkpoint_the_one_that_covers_the_formula_is_asked(monkeypatch):
    displayed, searched, warned = [], [], []

    def search(model, *_, **__):
        searched.append(len(training_counts(model)))
        warned.append("seldom" in texts(displayed))

    monkeypatch.setattr(form, "is_live", lambda: True)
    monkeypatch.setattr(form, "display", displayed.append)
    monkeypatch.setattr(form, "predict", search)
    form.show_form("NaCl")
    for formula in ("KBr", "LiFePO4"):
        asyncio.run(asyncio.wait_for(type_late(parts(displayed[0]), formula), 60))
    assert searched == [len(training_counts(load_model(name))) for name in ("mp20", "mp")]
    assert warned == [False, True]


async def press_both(shown):
    """Predict, then Stop while the search runs; wait for the end."""
    go, halt = button(shown, "Predict"), button(shown, "Stop")
    assert halt.disabled and not go.disabled
    go.click()
    while halt.disabled:
        await asyncio.sleep(0.01)
    assert go.disabled
    halt.click()
    while go.disabled:
        await asyncio.sleep(0.01)
    assert halt.disabled


def texts(shown):
    return " ".join(part.value for part in parts(shown[0]) if isinstance(part, widgets.HTML))


def test_stop_ends_the_search_and_shows_what_was_found(shown, monkeypatch):
    monkeypatch.setattr("contsp_core.app.prediction.prototype", space_group)  # a name in less time
    quick = PredictConfig(n_samples=2, n_steps=2, n_units=(1,), n_jobs=1)
    found = predict(load_model("prototypes"), "NaCl", quick)

    def search(*_, stop):
        limit = time.monotonic() + 10
        while not stop() and time.monotonic() < limit:
            time.sleep(0.01)
        assert stop()
        return found

    monkeypatch.setattr(form, "predict", search)
    asyncio.run(asyncio.wait_for(press_both(shown), 60))
    assert "2 candidates by prototypes until it was stopped" in texts(shown)
    assert "space group" in texts(shown)
    assert "background:" in texts(shown).partition("<a ")[2].partition("download='NaCl.zip'")[0]


def test_a_stop_before_anything_is_found_is_said_plainly(shown, monkeypatch):
    def search(*arguments, stop):
        limit = time.monotonic() + 10
        while not stop() and time.monotonic() < limit:
            time.sleep(0.01)
        return predict(*arguments, stop=stop)

    monkeypatch.setattr(form, "predict", search)
    asyncio.run(asyncio.wait_for(press_both(shown), 60))
    assert "was stopped too early: nothing was found" in texts(shown)
    assert "templates" not in texts(shown)
