"""The report: self-contained, escaped, complete, and honest in its verdict."""

from __future__ import annotations

import base64
import copy
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from metafit.errors import BadInput
from metafit.evaluation.plots import comparison_figure
from metafit.evaluation.report import short, verdict, write_report


def result(lead=0.031, ci=0.005, modality="text", learners=4, way=5, steps=5, gallery=None, rng_seed=0):
    """A realistic result dict; ``lead`` is the paired difference of the first learner to every baseline."""
    rng = np.random.default_rng(rng_seed)
    names = [
        ("protonet", "Prototypical network, learned map", "metric", True, ""),
        ("centroid", "Frozen centroid", "baseline", False, ""),
        ("logistic", "Logistic regression on frozen features", "baseline", False, ""),
        ("maml", "MAML", "gradient", True, "batch normalisation over the query set"),
        *((f"extra{i}", f"Extra learner {i}", "gradient", i % 2 == 0, "") for i in range(learners)),
    ][:learners]
    metric = "mse" if modality == "vector" else "accuracy"

    def row(i, trained):
        behind = 0.0 if i == 0 else 0.011 if trained else lead
        mean = (0.8 if metric == "accuracy" else 0.77) - behind
        metrics = {
            metric: {"mean": mean, "ci95": 0.0042},
            "loss": {"mean": 0.284 + i, "ci95": 0.013},
            "adapt_ms": {"mean": 0.37 * (i + 1) ** 2, "ci95": 0.01},
        }
        calibration = []
        if metric == "accuracy":
            metrics["ece"] = {"mean": 0.031 + 0.01 * i, "ci95": None}
            at = np.linspace(0.25, 0.95, 8)
            calibration = [
                {"confidence": float(c), "accuracy": float(c - 0.02 * i), "count": int(900 * c**2)} for c in at
            ]
        sign = -1 if metric == "accuracy" else 1
        length = 1 if trained and i == 0 else steps
        curve = [
            {
                "step": s,
                metric: {"mean": float(mean * (1 + sign * 0.6 * np.exp(-s - (length == 1) * 9))), "ci95": 0.004},
                "loss": {"mean": 1.0 / (s + 1), "ci95": 0.01},
            }
            for s in range(length)
        ]
        history = [
            {
                "step": 100 * s,
                "loss": float(1.3 * np.exp(-s / 6) + 0.3 + 0.03 * rng.standard_normal()),
                "validation": None if s % 2 else float(0.75 - 0.25 * np.exp(-s / 5)),
                "seconds": 41.3 * s / 20,
            }
            for s in range(21)
        ]
        return {"metrics": metrics, "curve": curve, "calibration": calibration, "history": history if trained else []}

    name, title, family, trained, transductive = names[0]
    classes = {
        part: [f"{part}_intent_{i}" for i in range(n)] for part, n in (("train", 90), ("validation", 15), ("test", 30))
    }
    first = row(0, trained)
    return {
        "schema": 1,
        "metafit": "0.1.0",
        "created": "2026-03-04T10:11:12Z",
        "learner": {
            "name": name, "title": title, "family": family, "paper": "Snell et al., 2017, arXiv:1703.05175",
            "options": {"distance": "squared", "temperature": 10}, "parameters": 147457, "meta_trained": trained,
            "transductive": transductive,
        },
        "backbone": "minilm-l6" if modality == "text" else None,
        "source": {
            "name": "home-intents", "modality": modality, "classes": classes,
            "examples": {"train": 9000, "validation": 1500, "test": 3000},
        },
        "protocol": {"way": way, "shot": 1, "query": 15, "episodes": 600, "seed": 1, "transductive": ""},
        **first,
        "gallery": _gallery(modality, [n[0] for n in names]) if gallery is None else gallery,
        "against": [
            {
                "learner": n, "title": t, "family": f, "meta_trained": m, "transductive": tr, **row(i, m),
                "paired_difference": {"metric": metric, "mean": lead if not m else 0.011, "ci95": ci},
            }
            for i, (n, t, f, m, tr) in enumerate(names[1:], 1)
        ],
        "environment": {
            "python": "3.11.9", "torch": "2.13.0", "device": "cpu", "threads": 2, "machine": "x86_64", "seconds": 83.2,
        },
    }  # fmt: skip


def _gallery(modality, names):
    if modality == "vector":
        return []
    words = {
        "lock_door": ["lock the front door please", "is the back door locked?", "secure the garage"],
        "play_music": ["put on some jazz in the kitchen", "skip this song", "play my running playlist"],
        "set_alarm": ["wake me at half past six", "an alarm for tomorrow, seven sharp", "cancel the nap timer"],
        "dim_lights": ["make it a little darker in here", "lights to thirty percent", "evening mood in the lounge"],
        "ask_weather": ["do I need an umbrella today", "how cold will it get tonight", "any snow this weekend? " * 12],
    }

    def show(i, j):
        if modality == "text":
            return {"text": list(words.values())[i][j]}
        return {"image": _picture(i, j)}

    def answers(i, q):
        return {
            n: {"class": i if (q + k) % 4 else (i + 1) % 5, "confidence": 0.93 - 0.1 * k}
            for k, n in enumerate(names[:4])
        }

    task = {
        "classes": list(words),
        "support": [{"class": i, **show(i, 0)} for i in range(5)],
        "query": [{"class": i, **show(i, 1 + i % 2), "answers": answers(i, q)} for q, i in enumerate((2, 0, 4, 1))],
    }
    return [task, copy.deepcopy(task), copy.deepcopy(task)]


def _picture(i, j):
    from PIL import Image

    x, y = np.meshgrid(np.linspace(-1, 1, 48), np.linspace(-1, 1, 48))
    shade = 127 + 120 * np.sin((3 + i) * x + j) * np.cos((2 + j) * y * (i + 1))
    file = io.BytesIO()
    Image.fromarray(shade.astype(np.uint8)).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


class _Page(HTMLParser):
    """Collects what a browser would load, and the text it would show; checks that elements are closed in order."""

    void = ("meta", "img", "br", "wbr")

    def __init__(self, html):
        super().__init__()
        self.loads, self.stack, self.shown = [], [], []
        self.feed(html)
        assert not self.stack, self.stack

    def handle_starttag(self, tag, attrs):
        assert tag not in ("script", "link", "iframe", "object", "embed", "base")
        for key, content in attrs:
            assert not key.startswith("on")
            if key in ("src", "srcset", "href", "xlink:href", "data", "action") and not content.startswith("#"):
                self.loads.append(content)
        if tag not in self.void:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.void:
            self.stack.pop()

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if "style" not in self.stack:
            self.shown.append(data)


def page(tmp_path, *results):
    html = write_report(list(results), tmp_path / "report.html").read_text()
    parsed = _Page(html)
    assert all(load.startswith("data:image/") for load in parsed.loads), parsed.loads
    assert not re.search(r"url\((?!#)|@import|@font-face", html)
    return html, " ".join(" ".join(parsed.shown).split())


@pytest.mark.parametrize("modality", ["text", "image", "vector"])
def test_every_figure_of_the_result_is_on_the_page(tmp_path, modality):
    html, text = page(tmp_path, result(modality=modality, lead=0.031 if modality != "vector" else -0.31))
    shown = ["0.284", "± 0.013", "0.37", "147,457", "home-intents", "600 tasks", "41 seconds", "2.13.0", "90 classes"]
    shown += ["0.770", "± 0.004", "−0.310"] if modality == "vector" else ["80.0", "± 0.4", "0.031", "3.1", "± 0.5"]
    for figure in shown:
        assert figure in text, figure
    for title in ("Prototypical network, learned map", "Frozen centroid", "MAML"):
        assert title in text
    assert html.count("<figure>") == (2 if modality == "vector" else 3)
    assert html.count("data:image/png") == (27 if modality == "image" else 0)
    assert len(html) < 300_000


def test_the_same_result_gives_the_same_bytes(tmp_path):
    first = write_report([result()], tmp_path / "a.html").read_bytes()
    assert first == write_report([result()], tmp_path / "b.html").read_bytes()


@pytest.mark.parametrize(
    ("lead", "words"),
    [
        (
            0.031,
            [
                "Meta-learning beats Frozen centroid, the best of 2",
                "by 3.1 points (95% interval 2.6 to 3.6)",
                "41 seconds of training",
                "0.37 ms",
            ],
        ),
        (0.002, ["is not shown to beat", "95% interval of its lead, −0.3 to 0.7 points, includes zero"]),
        (-0.012, ["does worse than Frozen centroid", "by 1.2 points (95% interval 0.7 to 1.7)"]),
    ],
)
def test_verdict_says_what_the_interval_says(tmp_path, lead, words):
    sentence = verdict(result(lead=lead))
    assert all(word in sentence for word in [*words, "600 tasks from 30 unseen classes"]), sentence
    assert sentence in page(tmp_path, result(lead=lead))[1]


def test_verdict_of_regression_reads_lower_as_better():
    assert "beats" in verdict(result(lead=-0.31, modality="vector"))
    assert "by 0.310 in squared error (95% interval 0.305 to 0.315)" in verdict(result(lead=-0.31, modality="vector"))
    assert "does worse" in verdict(result(lead=0.31, modality="vector"))


def test_right_and_wrong_answers_differ_by_mark_and_word(tmp_path):
    html, _ = page(tmp_path, result())
    assert html.count('aria-label="wrong">✗') == 3 * 4 and html.count('aria-label="right">✓') == 3 * 12


def test_verdict_picks_the_strongest_rival_and_turns_the_sign_when_the_baseline_is_first():
    one = result()
    one["against"][1]["metrics"]["accuracy"]["mean"] = 0.79  # logistic regression overtakes the centroid
    assert "beats Logistic regression on frozen features, the best of 2 learners without it, by" in verdict(one)
    one["learner"].update(meta_trained=False, title="Untrained")
    one["against"][2]["paired_difference"] = {"metric": "accuracy", "mean": -0.04, "ci95": 0.01}
    assert "Meta-learning (transductive) beats Untrained, which had no meta-training, by 4.0 points" in verdict(one)
    one["random_weights"] = True
    assert "beats Untrained, which had no meta-training, over random weights, by 4.0 points" in verdict(one)


def test_a_better_meta_learner_is_named(tmp_path):
    one = result()
    one["against"][2]["paired_difference"]["mean"] = -0.02
    assert "Also meta-trained, and better still: MAML (transductive: batch normalis" in page(tmp_path, one)[1]
    assert "better still" not in page(tmp_path, result())[1]


def test_a_tiny_but_certain_lead_is_not_rounded_to_zero():
    assert "by 0.040 points (95% interval 0.035 to 0.045)" in verdict(result(lead=0.0004, ci=0.00005))


def test_missing_interval_is_no_evidence():
    assert "without an interval is no evidence" in verdict(result(ci=None))


def test_data_is_escaped_and_foreign_pictures_are_not_loaded(tmp_path):
    evil = '<script>alert("1")</script>&amp; $x^2 "><img src=http://evil.example/x>'
    one = result(gallery=[])
    one["source"]["name"] = one["learner"]["title"] = one["against"][0]["title"] = evil
    one["against"][0]["transductive"] = one["backbone"] = one["environment"]["machine"] = evil
    one["source"]["classes"]["test"] = [evil, "\u202eright to left", "émigré 日本 🙂", "x" * 5000, "\ud800"]
    query = {"class": 0, "image": "http://evil.example/x.png", "answers": {evil: {"class": 1, "confidence": None}}}
    one["gallery"] = [{"classes": [evil, "b"], "support": [{"class": 1, "text": evil * 40}], "query": [query]}]
    html, text = page(tmp_path, one)  # the parser refuses scripts, handlers and loads
    assert "<script" not in html
    assert '<script>alert("1")</script>&amp; $x^2' in text
    assert 'title="' + "x" * 5000 in html and "x" * 200 not in text
    comparison_figure(one, tmp_path / "evil.svg")


def test_transductive_is_printed_wherever_the_learner_is(tmp_path):
    one = result()
    one["learner"]["transductive"] = "looks at all queries"
    html, text = page(tmp_path, one)
    assert "(transductive: looks at all queries)" in text
    tagged = re.findall(r"Prototypical network, learned map</bdi>( <em class=\"tag\")?", html)
    assert len(tagged) > 5 and "" not in tagged
    assert verdict(one).startswith("Meta-learning (transductive) beats")


def test_the_options_of_each_learner_are_told(tmp_path):
    made = result()
    made["against"][0]["options"] = {"pull": 0.1, "scope": "<i>head"}
    html, text = page(tmp_path, made)
    assert "temperature = 10" in text and "pull = 0.1 , scope = <i>head" in text and "&lt;i&gt;head" in html


@pytest.mark.parametrize(
    "change",
    [
        {"against": []},
        {"history": [], "gallery": [], "calibration": [], "curve": []},
        {"against": [], "history": [], "gallery": [], "backbone": None, "environment": {}},
        {"metrics": {"accuracy": {"mean": None, "ci95": None}}},
        {"source": {"name": "sines", "modality": "vector", "classes": {"train": [], "validation": [], "test": []}}},
    ],
)
def test_sparse_results_do_not_break(tmp_path, change):
    one = {**result(steps=1), **change}
    _, text = page(tmp_path, one)
    assert "nan" not in text.lower() and "undefined" not in text.lower() and "None" not in text
    assert (comparison_figure(one, tmp_path / "x.png")).stat().st_size > 1000
    if not one["against"]:
        assert "no learner without meta-training to compare it with" in text


def test_many_learners_way_ranges_and_several_results(tmp_path):
    many = result(learners=12, way=[2, 5])
    many["source"]["classes"]["test"] = [f"class {i}" for i in range(700)]
    html, text = page(tmp_path, many, result(lead=0.0), result(lead=-0.3, modality="vector"))
    assert "2 to 5-way" in text and "ahead in 2 of 3 comparisons" in text and "Extra learner 7" in text
    assert re.search(r"<details><summary>show the classes</summary>\s*<p class=\"classes\"><bdi>class 0<", html)
    marks = re.findall(r'<(?:path|rect)[^>]* id="([^"]+)"[^>]* d="([^"]+)"', html)
    assert len(marks) > 10 and len(dict(marks)) == len(
        set(marks)
    )  # one id, one shape: charts cannot mix up their marks


def test_bad_input_is_one_line(tmp_path):
    with pytest.raises(BadInput, match="at least one"):
        write_report([], tmp_path / "r.html")
    with pytest.raises(BadInput, match="schema 2"):
        write_report([{"schema": 2}], tmp_path / "r.html")
    with pytest.raises(BadInput, match=r"\.png or \.svg"):
        comparison_figure(result(), tmp_path / "figure.bmp")


def test_long_names_break_after_underscores_and_stay_escaped() -> None:
    assert str(short("card_arrival <b>/&")) == "<bdi>card_<wbr>arrival &lt;b&gt;/<wbr>&amp;</bdi>"
    assert str(short("a_b_c_d", 4)) == '<bdi title="a_b_c_d">a_<wbr>b…</bdi>'


def test_a_training_that_kept_its_start_says_so():
    one, said = result(), "No step of its training made the validation tasks better"
    assert said not in verdict(one)
    one["history"] = [{"step": s, "loss": 1.0, "validation": v, "seconds": 1.0} for s, v in enumerate((0.6, 0.6, 0.5))]
    assert said in verdict(one)
    one["history"] = one["history"][:1]
    assert said not in verdict(one), "it was not looked at again"
