"""A form to type a formula into, for a live notebook; elsewhere one line says so."""

from __future__ import annotations

import asyncio
import base64
import html
import io
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from typing import Any

import ipywidgets as widgets
from IPython.display import display

from contsp_core import load_model
from contsp_core.app.files import identify, provenance, write_prediction
from contsp_core.app.prediction import (
    DEFAULTS,
    FALLBACK,
    TOO_CLOSE,
    PredictConfig,
    Prediction,
    choose_checkpoint,
    describe_cells,
    plan,
    predict,
)
from contsp_core.csp.candidates import TemplateLibrary, standardise
from contsp_core.csp.views import is_live, view_crystal
from contsp_core.data import CHECKPOINTS, one_line

HELD_BACK_S = 0.5  # in which what was typed while the kernel was busy arrives: the browser sends it after the click
# a link that looks like a button, also where the style sheet of JupyterLab is not at hand
BUTTON = "display:inline-block;padding:4px 14px;border-radius:3px;background:#1f6f8b;color:white;text-decoration:none"


def show_form(formula: str = "SrTiO3", checkpoint: str | None = None) -> None:
    """Show the form where someone can answer it: formula, checkpoint, source, samples; Predict, Stop, download.

    Without a checkpoint, the first of ``DEFAULTS`` that covers the formula answers.
    """
    if not is_live():
        print("In a live notebook a form appears here: type a formula, press Predict, look, download.")
        return
    bundled = {path.stem for path in CHECKPOINTS.glob("*.safetensors")} | ({checkpoint} if checkpoint else set())
    names = [" or ".join(DEFAULTS), *sorted(name for name in bundled if not name.endswith("_judge"))]  # it only ranks
    options = {"style": {"description_width": "80px"}}
    text = widgets.Text(formula, description="formula", **options)
    model = widgets.Dropdown(options=names, value=checkpoint or names[0], description="checkpoint", **options)
    source = widgets.Dropdown(options=("chains", "templates", "both"), description="source", **options)
    n_samples = widgets.BoundedIntText(20, min=1, max=1000, description="samples", **options)
    button = widgets.Button(description="Predict", button_style="primary", icon="cube")
    stop = widgets.Button(description="Stop", icon="stop", disabled=True)
    message, result = widgets.HTML(), widgets.VBox()
    stopped, tasks = Event(), set[asyncio.Task[None]]()

    async def answer() -> None:
        button.disabled, result.children = True, ()
        stopped.clear()
        await asyncio.sleep(HELD_BACK_S)
        try:
            config = PredictConfig(source.value, n_samples.value)
            models = {name: load_model(name) for name in (DEFAULTS if model.value == names[0] else [model.value])}
            used, config = choose_checkpoint(models, text.value, config)
            energy, identity = models[used], identify(used)
            sizes, doubts = plan(energy, text.value, config)
            beyond = [FALLBACK] if used != next(iter(models)) else []
            doubted = "".join(f"<br><b>{doubt}</b>" for doubt in beyond + doubts)
            begun = html.escape(f"{used} searches {text.value}")
            message.value = f"{begun}: {describe_cells(energy, sizes)} …{doubted}"
            stop.disabled = source.value == "templates"  # which are made in one go
            library = None
            if config.source != "chains":
                library = TemplateLibrary.of_checkpoint(used)
            # in a thread, so that the kernel hears Stop
            prediction = await asyncio.to_thread(predict, energy, text.value, config, library, stop=stopped.is_set)
            said = [f"<b>{doubt}</b>" for doubt in beyond + prediction.doubts]
            said += [TOO_CLOSE] if "too close" in prediction.table else []
            origin = provenance(identity, config, prediction)
            end = html.escape(used) + " until it was stopped" * stopped.is_set()
            message.value = "<br>".join([f"{prediction.formula}: {prediction.n_made} candidates by {end}", *said])
            table = widgets.HTML(prediction.table.round(2).to_html(border=0))
            result.children = (table, _viewer(prediction), _download(prediction, origin))
        except Exception as error:  # whatever it is, it is told where someone looks
            message.value = f"<b style='color:#b00'>{html.escape(one_line(error))}</b>"
        finally:
            button.disabled, stop.disabled = False, True

    def begin(_: Any) -> None:
        tasks.add(task := asyncio.get_running_loop().create_task(answer()))  # the loop itself keeps no reference
        task.add_done_callback(tasks.discard)

    def end_early(_: Any) -> None:
        stopped.set()
        stop.disabled, message.value = True, "stopping after the batch in progress …"

    button.on_click(begin)
    stop.on_click(end_early)
    buttons = widgets.HBox([source, n_samples, button, stop])
    display(widgets.VBox([widgets.HBox([text, model]), buttons, message, result]))


def _viewer(prediction: Prediction) -> widgets.VBox:
    """Any crystal of the ranking, chosen by its rank, to turn by hand."""
    labels = {f"{rank}: {group}": rank for rank, group in prediction.table["space group"].items()}
    rank, view = widgets.Dropdown(options=labels, description="rank"), widgets.Output()

    def draw(_: Any) -> None:
        # what answers a button does not look live by itself; and set like this, since the browser no longer listens
        # for what a message displays that came before the search
        bundle = view_crystal(standardise(prediction.best[rank.value - 1])).bundle(live=True)
        data = {kind: base64.b64encode(x).decode() if isinstance(x, bytes) else x for kind, x in bundle.items()}
        view.outputs = ({"output_type": "display_data", "data": data, "metadata": {}},)

    rank.observe(draw, "value")
    draw(None)
    return widgets.VBox([rank, view])


def _download(prediction: Prediction, origin: dict[str, Any]) -> widgets.HTML:
    """A link to all files of the prediction in one archive, which the page itself holds."""
    archive = io.BytesIO()
    with TemporaryDirectory() as folder, zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        for path in sorted(write_prediction(prediction, Path(folder, prediction.formula), origin).iterdir()):
            packed.write(path, f"{prediction.formula}/{path.name}")
    content, name = base64.b64encode(archive.getvalue()).decode(), f"{prediction.formula}.zip"
    link = f"<a style='{BUTTON}' download='{name}' href='data:application/zip;base64,{content}'>download {name}</a>"
    return widgets.HTML(link + " (table, CIF, POSCAR, extended XYZ, powder patterns)")
