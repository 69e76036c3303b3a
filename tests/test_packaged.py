from __future__ import annotations

import pickle
import random

import numpy as np
import pytest
import torch

from metafit import wheels
from metafit.data import array_pickle, chatter_topics, home_intents, packaged
from metafit.data.templates import expand
from metafit.errors import BadInput


@pytest.fixture(scope="module")
def intents():
    return packaged.load("home-intents")


@pytest.mark.parametrize("name", packaged.names())
def test_every_entry_is_described_and_loads(name):
    source = packaged.load(name)
    entry = next(entry for entry in packaged.catalog() if entry.name == name)
    assert (source.name, source.modality) == (name, entry.modality)
    assert entry.description and entry.licence and entry.origin
    assert [len(part.classes) >= 2 for part in source.split()] == [True] * 3
    assert source.digest() == packaged.load(name).digest()


def test_home_intents(intents):
    assert len(intents.classes) == 38
    assert intents.counts.min() >= home_intents.FEWEST
    assert intents.counts.max() == home_intents.UTTERANCES
    assert {"turn_on", "start_timer", "get_weather"} <= set(intents.classes)
    spoken = [home_intents._spoken(text) for text in intents.x]
    assert len(set(spoken)) == len(spoken)  # distinct within an intent and across them
    assert not any(set(text) & set("[](){}<>|;") for text in intents.x)
    assert home_intents.load(seed=1).digest() != intents.digest()


def test_home_intents_can_be_told_apart_from_few_words(intents):
    """Bag of words, 5 examples an intent: labels and texts belong together."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.neighbors import NearestCentroid

    counts = CountVectorizer(binary=True).fit_transform(intents.x).toarray().astype(float)
    y = intents.y.numpy()
    order = np.random.default_rng(0).permutation(len(y))
    support = np.concatenate([order[y[order] == c][:5] for c in range(len(intents.classes))])
    query = np.setdiff1d(order, support)
    assert NearestCentroid().fit(counts[support], y[support]).score(counts[query], y[query]) > 0.6


def test_templates():
    rules = {"turn": "(turn|switch)", "light": "<turn> on [the] {name}"}
    rng = random.Random(0)
    said = {expand("<light>", rules, lambda name, _: f"{name} lamp", rng) for _ in range(200)}
    assert said == {f"{verb} on {the}name lamp" for verb in ("turn", "switch") for the in ("", "the ")}
    assert {expand("(a;b)", {}, lambda *_: "", rng) for _ in range(20)} == {"a b", "b a"}
    assert {expand("light[s|ing]", {}, lambda *_: "", rng) for _ in range(90)} == {"light", "lights", "lighting"}
    for broken in ("turn (on", "<nothing>", "{name", "[a"):
        with pytest.raises(BadInput, match="not closed"):
            [expand(broken, {}, lambda *_: "x", rng) for _ in range(20)]


def test_chatter_lines_are_what_a_yaml_reader_finds():
    yaml = pytest.importorskip("yaml")
    differing = 0
    for path in wheels.members("chatterbot-corpus", "chatterbot_corpus/data/english/*.yml"):
        corpus = wheels.member("chatterbot-corpus", path).decode()
        expected = [" ".join(conversation[0].split()) for conversation in yaml.safe_load(corpus)["conversations"]]
        found = chatter_topics.first_lines(corpus)
        differing += len(set(expected) ^ set(found))
    assert differing <= 1  # one conversation of trivia.yml is indented differently


def test_chatter_topics_have_ten_distinct_lines_each():
    source = packaged.load("chatter-topics")
    assert len(source.classes) == 16
    assert source.counts.min() == 10
    assert len({text.casefold() for text in source.x}) == len(source)


def test_animals():
    source = packaged.load("animals")
    assert source.x.shape == (9716, 1, 28, 28)
    assert source.x.dtype == torch.uint8
    assert len(torch.unique(source.x.flatten(1), dim=0)) == len(source)
    assert source.counts.tolist() == [937, 812, 992, 996, 997, 1000, 1000, 997, 985, 1000]


def test_digits_use_the_whole_range():
    source = packaged.load("digits")
    assert source.x.shape == (1797, 1, 8, 8)
    assert (int(source.x.min()), int(source.x.max())) == (0, 255)


def test_keel_tables():
    names = packaged.tables()
    assert len(names) == 141
    iris = packaged.load("keel:iris")
    assert iris.x.shape == (150, 4)
    assert iris.x[0].tolist() == pytest.approx([5.1, 3.5, 1.4, 0.2])
    assert iris.classes == ("Iris-setosa", "Iris-versicolor", "Iris-virginica")
    assert packaged.load("keel:breast").x.shape[0] == 277  # categories become columns
    assert set(packaged.load("keel:breast").x[:, :6].unique().tolist()) == {0, 1}
    assert len(packaged.load("keel:cleveland-0_vs_4")) == 173  # 4 of 177 rows lack a value
    for name in names[::10]:
        assert packaged.load(f"keel:{name}").modality == "vector"


def test_unknown_names():
    with pytest.raises(BadInput, match="did you mean 'home-intents'"):
        packaged.load("home-intent")
    with pytest.raises(BadInput, match="unknown table 'iriss': did you mean 'iris'"):
        packaged.load("keel:iriss")


def test_array_pickle_reads_arrays():
    for array in (np.arange(6).reshape(2, 3), np.zeros((0, 2), dtype=np.uint8), np.asfortranarray(np.eye(3))):
        for protocol in (3, 4):
            assert np.array_equal(array_pickle.loads(pickle.dumps(array, protocol), "array"), array)


class Exploit:
    def __reduce__(self):
        return (print, ("this must never be printed",))


@pytest.mark.parametrize(
    "value",
    [Exploit(), [Exploit()], np.array([Exploit()], dtype=object), np.array(["a", None], dtype=object), {"a": 1}]
    + [np.ma.masked_array([1, 2]), np.random.default_rng(0), b"x"],
)
def test_array_pickle_refuses_everything_else(value, capfd):
    with pytest.raises(BadInput, match=r"not loaded|not a readable array"):
        array_pickle.loads(pickle.dumps(value), "array")
    assert "must never" not in capfd.readouterr().out


def test_array_pickle_refuses_damage():
    content = pickle.dumps(np.arange(100))
    for damaged in (content[:50], b"", b"garbage", content[:-200]):
        with pytest.raises(BadInput, match="fetch the file again"):
            array_pickle.loads(damaged, "array")


def test_the_demo_begins_with_the_network_of_its_seed():
    from metafit.apps.demo import _shapes

    made = []
    for seed in (0, 0, 1):
        made.append(next(_shapes(seed).body.parameters()))
        torch.rand(3)  # what was drawn before must not matter
    one, again, other = made
    assert torch.equal(one, again) and not torch.equal(one, other)
