"""Makes event_files/read.json: what the `tensorboard` package reads from our event files.

    python event_files.py

The files in event_files/whole and event_files/resumed are written by the tests in
crates/train/src/metrics/journal/tensorboard.rs. `whole` is a run before it is resumed after its second
step, `resumed` after that: its first file is cut back, and a second one goes on.

Each folder is read in two ways, which must agree: as files, by `EventAccumulator`, and for the web page,
by the data provider behind its scalars, histograms and text. `values` has a tag's events, `page` the
tags that the page shows, by plugin.

Made with tensorboard 2.21.0, protobuf 7.36.2, numpy 2.4.6.
"""

import importlib.metadata
import json
import pathlib

from tensorboard import context
from tensorboard.backend.event_processing import data_provider, event_accumulator, plugin_event_multiplexer
from tensorboard.data import provider
from tensorboard.util import tensor_util

OUT = pathlib.Path(__file__).parent / "event_files"
PACKAGES = ["tensorboard", "protobuf", "numpy"]
# All events, not a sample of them.
ALL = {kind: 0 for kind in event_accumulator.DEFAULT_SIZE_GUIDANCE}


def event(of, value):
    return {"step": of.step, "wall_time": of.wall_time, "value": value}


def from_files(folder):
    """The events of each tag, by `EventAccumulator`."""
    files = event_accumulator.EventAccumulator(str(folder), size_guidance=ALL)
    files.Reload()
    tags = files.Tags()
    values = {tag: [event(e, e.value) for e in files.Scalars(tag)] for tag in tags["scalars"]}
    for tag in tags["histograms"]:
        values[tag] = [event(e, histogram(e.histogram_value)) for e in files.Histograms(tag)]
    for tag in tags["tensors"]:
        assert files.SummaryMetadata(tag).plugin_data.plugin_name == "text", tag
        values[tag] = [event(e, tensor_util.make_ndarray(e.tensor_proto).item().decode()) for e in files.Tensors(tag)]
    # Distributions are made of the histograms.
    others = {kind for kind, found in tags.items() if found} - {"scalars", "histograms", "distributions", "tensors"}
    assert not others, others
    return values


def histogram(value):
    names = ["min", "max", "num", "sum", "sum_squares", "bucket_limit", "bucket"]
    return {name: getattr(value, name) for name in names}


def from_page(folder):
    """The events of each tag by plugin, as the page gets them."""
    all_of = {"scalars": 0, "histograms": 0, "text": 0}
    runs = plugin_event_multiplexer.EventMultiplexer(tensor_size_guidance=all_of)
    runs.AddRun(str(folder), "run")
    runs.Reload()
    data = data_provider.MultiplexerDataProvider(runs, str(folder))
    where = {"experiment_id": "", "run_tag_filter": provider.RunTagFilter(runs=["run"]), "downsample": 10**6}
    c = context.RequestContext()
    scalars = data.read_scalars(c, plugin_name="scalars", **where)["run"]
    tensors = {plugin: data.read_tensors(c, plugin_name=plugin, **where)["run"] for plugin in ["histograms", "text"]}
    histograms, texts = tensors["histograms"], tensors["text"]
    return {
        "scalars": {tag: [event(e, e.value) for e in events] for tag, events in scalars.items()},
        "histograms": {tag: [event(e, e.numpy.tolist()) for e in events] for tag, events in histograms.items()},
        "text": {tag: [event(e, e.numpy.item().decode()) for e in events] for tag, events in texts.items()},
    }


def read(folder):
    values, page = from_files(folder), from_page(folder)
    for tag, events in page["histograms"].items():
        # The page draws bars, each from where to where and how high; empty ones at both ends are left out.
        for shown, of in zip(events, values[tag], strict=True):
            of["value"]["bars"] = shown["value"]
            shown["value"] = of["value"]
    for plugin, tags in page.items():
        for tag, events in tags.items():
            assert events == values[tag], (plugin, tag, events, values[tag])
    return {"values": dict(sorted(values.items())), "page": {plugin: sorted(tags) for plugin, tags in page.items()}}


def main():
    found = {"versions": {name: importlib.metadata.version(name) for name in PACKAGES}}
    found |= {name: read(OUT / name) for name in ["whole", "resumed"]}
    # A line for each event.
    text = json.dumps(found, ensure_ascii=False)
    for start in ['{"step"', '"values"', '"page"', '"text"', '"whole"', '"resumed"']:
        text = text.replace(start, "\n" + start)
    assert json.loads(text) == found
    (OUT / "read.json").write_text(text + "\n")


main()
