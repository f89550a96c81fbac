"""One base, an adapter for each of four real tasks, and one batch in which each request uses the adapter of its task.

    python examples/many_tasks.py [--quick]       # after `make demo`, which installs what it needs

"films", "tweets" and "products": is a sentence negative or positive? "source": does it come from a film review, a tweet, a
product review or an editorial? The base is MiniLM with a head of four outputs that nobody trained. Each task has a LoRA on
every projection and on the head. There, rank 8 is more than full rank, so each task learns a separate head. The adapters
are trained one after the other in one model, from the same base. Then a fresh base serves all of them from their files.

The learning rate, of 2e-3, 4e-3 and 8e-3, was chosen on sentences 1,600 to 1,900 of each source; the first two could not be
told apart there, and the third failed. Accuracies are from later sentences. These are shuffled, so sentences of one product
review or editorial may be in both the training and the test set. "group after group" makes one call for each task: with
the plain base, as if there were a merged copy for each task, and with the model in which the adapters were trained, where
inactive adapters still cost their products.
"""

import argparse
import math
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import numpy as np
from movie_reviews_data import CACHE, load_minilm, load_sentences
from rich.console import Console
from rich.table import Table

import keras_lora

SOURCES = {"films": "movieReviewSnippets", "tweets": "tweets", "products": "amazonReviewSnippets"}
EDITORIALS = "nytEditorialSnippets"
TRAIN, TEST = slice(0, 1600), slice(1900, 2900)
RANK, BATCH, LEARNING_RATE, EPOCHS = 8, 32, 2e-3, 1


def load_tasks(at: slice) -> dict[str, tuple[dict, np.ndarray]]:
    """Tokens and labels of each task. "source" has a quarter of its sentences from each source."""
    sources = {name: load_sentences(source) for name, source in SOURCES.items()}
    tasks = {name: (rows(x, at), y[at]) for name, (x, y) in sources.items()}
    each = (at.stop - at.start) // 4
    parts = [rows(x, slice(at.start, at.start + each)) for x, _ in (*sources.values(), load_sentences(EDITORIALS))]
    return {**tasks, "source": (joined(parts), np.repeat(np.arange(4, dtype="int32"), each))}


def rows(x: dict, at) -> dict:
    return {key: each[at] for key, each in x.items()}


def joined(parts: list[dict]) -> dict:
    return {key: np.concatenate([each[key] for each in parts]) for key in parts[0]}


def build_base(blocks: int, name: str = "base") -> keras.Model:
    """The first blocks of MiniLM, the mean over the tokens, and an untrained head: the same numbers each time."""
    keras.utils.set_random_seed(0)
    encoder = load_minilm()
    tokens = encoder.get_layer(f"transformer_layer_{blocks - 1}").output
    mean = keras.layers.GlobalAveragePooling1D()(tokens, mask=encoder.input["padding_mask"])
    return keras.Model(encoder.input, keras.layers.Dense(4, name="head")(mean), name=name)


def train_adapter(model: keras.Model, name: str, x: dict, y: np.ndarray) -> None:
    """Add an adapter to the model and train it; the others are off and frozen meanwhile."""
    print(f"\n{name}", flush=True)
    keras_lora.apply_lora(model, rank=RANK, head=None, name=name)
    steps = EPOCHS * math.ceil(len(y) / BATCH)
    warmup = steps // 10
    schedule = keras.optimizers.schedules.CosineDecay(0.0, steps - warmup, warmup_target=LEARNING_RATE, warmup_steps=warmup)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.AdamW(schedule, weight_decay=0.0), loss)
    model.fit(x, y, batch_size=BATCH, epochs=EPOCHS, verbose=2)


def milliseconds(function, *arguments) -> float:
    start = time.perf_counter()
    function(*arguments)
    return 1000 * (time.perf_counter() - start)


def in_groups(model: keras.Model, x: dict, names: list) -> np.ndarray:
    """Answer the requests of one adapter, then those of the next."""
    answers = np.zeros((len(names), 4), "float32")
    for name in dict.fromkeys(names):
        own = np.array([each == name for each in names])
        if model.name == "adapted":
            keras_lora.activate_adapters(model, name)
        answers[own] = model.predict_on_batch(rows(x, own))
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two tasks, one block of six: shows that it runs, not how well")
    quick = parser.parse_args().quick
    blocks, repeats = (1, 3) if quick else (6, 30)
    train, test = load_tasks(slice(0, 32) if quick else TRAIN), load_tasks(slice(1900, 1904) if quick else TEST)
    tasks = ["films", "source"] if quick else list(train)
    base, model = build_base(blocks), build_base(blocks, "adapted")
    accuracy = Table("task", "most frequent class", "no adapter", "own adapter", "standard error")
    alone, without = {}, {}  # the answers of each adapter to its test sentences, and of the base

    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        files = {name: Path(folder) / f"{name}.safetensors" for name in tasks}
        for name in tasks:
            train_adapter(model, name, *train[name])
            keras_lora.save_adapter(model, files[name], name=name)
            x, y = test[name]
            alone[name] = model.predict(x, batch_size=200, verbose=0)
            without[name] = base.predict(x, batch_size=200, verbose=0)
            right, wrong = (float(np.mean(answer[name].argmax(-1) == y)) for answer in (alone, without))
            error = math.sqrt(right * (1 - right) / len(y))
            frequent = np.mean(y == np.bincount(train[name][1]).argmax())
            accuracy.add_row(name, f"{frequent:.3f}", f"{wrong:.3f}", f"{right:.3f}", f"{error:.3f}")
        print(f"\n{keras_lora.list_adapters(model).total}")
        print("MB of the files:", *(f"{path.stat().st_size / 1e6:.2f}" for path in files.values()))
        served = keras_lora.MultiAdapterModel(build_base(blocks), capacity=4, rank=RANK, head=None)
        Console().print(accuracy)
        serve(served, base, model, files, {name: x for name, (x, _) in test.items()}, alone, without, repeats)


def serve(served, base, model, files, sentences, alone, without, repeats) -> None:
    """Load the files into one model, answer mixed batches, check the answers, and measure."""
    tasks = list(files)
    # The test sentences of the tasks take turns. Each asks for the adapter of its task, every fifth (or third) for the base.
    order = np.arange(sum(map(len, alone.values()))).reshape(len(tasks), -1).T.ravel()
    names = [None if i % (len(tasks) + 1) == len(tasks) else tasks[i % len(tasks)] for i in range(len(order))]
    x = rows(joined([sentences[name] for name in tasks]), order)
    answers = [np.concatenate([answer[name] for name in tasks])[order] for answer in (without, alone)]
    expected = np.where(np.array([name is None for name in names])[:, None], *answers)
    few, few_names = rows(x, slice(0, BATCH)), names[:BATCH]

    def mixed(names=few_names) -> np.ndarray:
        return served.predict_on_batch({**few, "adapter_index": served.index_of(names)})

    *first, last = tasks
    for name in first:
        served.load(files[name], name)
    others = [name if name in first else None for name in few_names]
    events = {"the first batch of all": milliseconds(mixed, others)}
    events[f"load '{last}'"] = milliseconds(served.load, files[last], last)
    events[f"the batch after it, with '{last}'"] = milliseconds(mixed)

    ways = {
        "plain base, one batch": lambda: base.predict_on_batch(few),
        "an adapter for each request, one batch": mixed,
        "plain base, group after group": lambda: in_groups(base, few, few_names),
        "`activate_adapters`, group after group": lambda: in_groups(model, few, few_names),
    }
    found = {way: answer() for way, answer in ways.items()}  # compiles what is not yet
    times = np.array([[milliseconds(answer) for answer in ways.values()] for _ in range(repeats)])  # they take turns
    everything = served.predict({**x, "adapter_index": served.index_of(names)}, batch_size=200, verbose=0)
    events[f"delete '{last}'"] = milliseconds(served.delete, last)
    events["the batch after it, without"] = milliseconds(mixed, others)

    caption = f"{len(few_names)} requests in {len(set(few_names))} groups; medians of {repeats}."
    latency = Table("", "ms", "of plain base", caption=caption)
    for way, median in zip(ways, np.median(times, axis=0), strict=True):
        latency.add_row(way, f"{median:.1f}", f"{median / np.median(times[:, 0]):.2f}")
    latency.add_section()
    for event, each in events.items():
        latency.add_row(event, f"{each:.1f}", "")
    Console().print(latency)
    print(f"Mixed batches took {times[:, 1].min():.1f} to {times[:, 1].max():.1f} ms.")

    differences = [np.abs(everything - expected).max()]
    differences += [np.abs(found[way] - expected[:BATCH]).max() for way in list(ways)[1::2]]
    print(f"largest difference of {len(names):,} mixed answers from each adapter alone: {max(differences):.1e}")
    print(f"the adapters change the answers of the base by up to {np.abs(answers[1] - answers[0]).max():.1e}")
    if not max(differences) <= 1e-4:  # so written, NaN fails too
        raise SystemExit("The difference must be at most 1e-4.")


if __name__ == "__main__":
    main()
