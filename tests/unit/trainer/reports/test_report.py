import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from comparing import refusal
from omegaconf import OmegaConf
from PIL import Image
from support import GENERATOR, generator_run, images, tokenizer_task

from trainer import TrainerError
from trainer.recipes import save_config
from trainer.reports.charts import IMAGE_TERMS, OTHER_TERMS, Chart, Point, draw_chart
from trainer.reports.report import read_metrics, training_work, write_report
from trainer.reports.sections import verdict
from trainer.tasks.gradient_balance import IMAGE_TERMS as TERMS_OF_THE_IMAGE
from trainer.tasks.gradient_balance import PLACES

EVALUATION = {
    "psnr": 20.61, "ssim": 0.61, "l1": 0.12, "usage": 0.79, "perplexity": 410.2, "baseline_mean_color_psnr": 13.2,
    "baseline_palette_psnr": 22.34, "image_count": 8, "token_count": 2048, "infinite_psnr_count": 0,
    "codebook_size": 1024, "downsampling_factor": 4, "protocol": "paper", "skipped": [],
    "manifest": {"checkpoint": "step_00000450", "weights": "ema", "held_out": True, "image_size": 64,
                 "resize": "pil_antialias", "device": "CPU (x86_64)"},
}  # fmt: skip


class Page(HTMLParser):
    """What a browser would see: text, pictures without words for them, links to elsewhere, tags left open."""

    VOID = frozenset({"meta", "img", "line", "circle", "br"})

    def __init__(self, html):
        super().__init__()
        self.open, self.text, self.images, self.elsewhere, self.charts = [], "", [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "img":
            self.images.append(attributes)
        if tag == "svg":
            self.charts.append(attributes["aria-label"])
        self.elsewhere += [v for k, v in attributes.items() if k in ("src", "href") and not v.startswith("data:image/")]

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.text += data


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "my <run>"
    (folder / "samples").mkdir(parents=True)
    config = {
        "run": str(folder), "seed": 0, "engine": {"kind": "deepspeed", "config": "zero2"},
        "trainer": {"max_steps": 450, "global_batch_size": 32, "precision": "fp32"},
        "data": {"train": ["a.tar", "b.tar"], "val": "bundled:val", "image_size": 64},
        "model": {"quantizer": "ibq", "codebook_size": 1024, "code_dim": 32, "channel_multipliers": [1, 2],
                  "patch_size": 2},
        "loss": {"perceptual": {"weight": 0}}, "optimizer": {"lr": 1e-3},
    }  # fmt: skip
    OmegaConf.save(config, folder / "config.yaml")
    return folder


def fill(run):
    """Everything that a finished run holds."""
    with (run / "metrics.jsonl").open("w") as file:
        for step in range(10, 451, 10):
            reconstruction = 0.5 * math.exp(-step / 200) + 0.05
            record = {"step": step, "loss/reconstruction": reconstruction, "codebook/usage": step / 600}
            file.write(json.dumps({**record, "images_per_second": 80.0}) + "\n")
        file.write(json.dumps({"step": 450, "val/psnr": 20.6}) + "\n")
    (run / "report.json").write_text(json.dumps(EVALUATION))
    Image.new("RGB", (40, 30), "red").save(run / "report.png")
    for step in range(0, 1000, 50):
        Image.new("RGB", (16, 8), "blue").save(run / "samples" / f"step_{step:08d}.png")


def test_a_finished_run_has_all_sections_and_needs_nothing_from_elsewhere(run):
    fill(run)
    path = write_report(run)
    assert path == run / "report.html"
    html = path.read_text()
    page = Page(html)
    assert page.open == [] and page.elsewhere == []
    assert not re.search(r"url\(|@import|<script", html)
    assert "my <run>" in page.text and "my <run>" not in html
    for heading in ("Results", "Reconstructions", "Training", "Images during training", "The run", "Next steps"):
        assert heading in page.text
    assert "64\N{MULTIPLICATION SIGN}64 pixels to 16\N{MULTIPLICATION SIGN}16 = 256 tokens" in page.text
    assert "1,024 codes (10 bits)" in page.text
    assert "That is 38 times fewer bits" in page.text
    for value in ("20.61", "22.34", "13.20", "0.610", "79.0%", "+7.4 dB"):
        assert value in page.text
    assert "450 of 450" in page.text and "3 min" in page.text and "deepspeed, zero2" in page.text
    assert "ibq resume '" in page.text  # the folder's name is quoted for the shell
    # report.png and six of twenty samples, the first and the last among them, all with words.
    assert len(page.images) == 7 and all(len(image["alt"]) > 20 for image in page.images)
    assert "step 0" in page.text and "step 950" in page.text


@pytest.mark.parametrize(
    ("grids", "words"), [([], "the 2x3 = 6 codes of an image"), (["1x5", "2x3"], "the codes (1x5 or 2x3) of an image")]
)
def test_the_report_of_a_generator_names_its_grids(tmp_path, grids, words):
    save_config(generator_run(replace(GENERATOR, grids=grids)), tmp_path / "config.yaml")
    text = Page(write_report(tmp_path).read_text()).text
    assert words in text.replace("\N{MULTIPLICATION SIGN}", "x")


def test_only_what_was_logged_is_drawn(run):
    fill(run)
    charts = Page(write_report(run).read_text()).charts
    assert [label.split(" over ")[0] for label in charts] == ["Reconstruction", "Validation", "Codebook usage", "Speed"]
    assert "L1 from 0.526 at step 10 to 0.103 at step 450" in charts[0]
    assert "training from 2% at step 10 to 75% at step 450" in charts[2]


def test_a_run_that_has_hardly_begun_is_reported_too(run):
    (run / "samples").rmdir()
    page = Page(write_report(run).read_text())
    assert "Not evaluated yet" in page.text and "ibq evaluate reconstruction" in page.text
    assert "Nothing was logged" in page.text
    assert page.charts == [] and page.images == []


def gradients(world) -> dict[str, float]:
    """What a step logs of them. All terms but the perceptual one, whose weights are not at hand."""
    task = tokenizer_task(world, trainer__log_gradient_balance=True, trainer__log_every_steps=1)
    scalars = task.step([images()], 0).scalars
    return {name: norm for name, norm in scalars.items() if name.startswith("gradient/")}


def test_logged_gradients_are_drawn_by_place(world, run):
    norms = gradients(world)
    lines = [json.dumps({"step": step} | {name: step * norm for name, norm in norms.items()}) for step in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    html = write_report(run).read_text()
    charts = {label.split(" over ")[0]: label.split(": ", 1)[1] for label in Page(html).charts}
    assert list(charts) == [f"Gradient at the {place}" for place in PLACES]
    assert html.index("Gradient at the features") < html.index("More curves") < html.index("Gradient at the codes")
    labels = {
        "reconstruction": "L1",
        "generator": "adversarial",
        "quantizer": "VQ losses",
        "entropy": "entropy penalty",
    }
    assert {name.rpartition("/")[2] for name in norms} == set(labels)
    assert set(labels) | {"perceptual", "convnext", "semantic"} == {*IMAGE_TERMS, *OTHER_TERMS}
    assert set(IMAGE_TERMS) == set(TERMS_OF_THE_IMAGE)
    for place, spoken in zip(PLACES, charts.values(), strict=True):
        curves = dict(curve.split(" from ") for curve in spoken.split("; "))
        assert list(curves) == list(labels.values())
        for term, label in labels.items():
            first = float(curves[label].split(" at step 1 to ")[0])
            assert first == pytest.approx(norms[f"gradient/{place}/{term}"], rel=0.01), (place, term)
    assert html.count("(log scale)") == 3
    drawn = re.findall(r'<polyline class="([^"]+)"[^>]*><title>([^<]+)', html)
    assert drawn == 3 * list(zip(("c0", "c1", "c2 dashed", "c3 dashed"), labels.values(), strict=True))


@pytest.mark.parametrize(
    "psnr, palette, words",
    [
        (20.61, 22.34, "does not beat a palette of 1,024 colours"),
        (23.0, 22.34, "The tokenizer beats"),
        (20.61, None, "20.61 dB against exact"),
        (None, None, "as good as"),
    ],
)
def test_the_verdict_is_honest(psnr, palette, words):
    sentence = verdict({**EVALUATION, "psnr": psnr, "baseline_palette_psnr": palette})
    assert words in sentence and "same bits per token" in sentence


def test_a_codebook_too_large_to_count_has_usage_of_groups_and_a_palette_of_all_colours(run):
    fill(run)
    counts = dict.fromkeys(("usage", "usage_65536", "perplexity"))
    counts |= {"group_usage": 0.25, "group_usage_65536": None, "group_perplexity": 3.5, "counted_codes": 2**17}
    huge = {**EVALUATION, **counts, "codebook_size": 2**32}
    (run / "report.json").write_text(json.dumps(huge))
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "codebook/group_usage": 0.2}) + "\n")
    page = Page(write_report(run).read_text())
    assert "usage of groups: of 131,072 values of bits" in page.text and "codebook usage" not in page.text
    assert "does not beat a palette of all 16,777,216 colours" in page.text
    assert "at 32 bits per token against the palette's 24" in page.text and "same bits per token" not in page.text
    assert any("Usage of groups" in chart for chart in page.charts)
    assert not any("Codebook usage" in chart for chart in page.charts)


def test_an_exact_reconstruction_is_reported(run):
    fill(run)
    exact = {**EVALUATION, "psnr": None, "infinite_psnr_count": 8, "skipped": ["broken.png"]}
    (run / "report.json").write_text(json.dumps(exact))
    text = Page(write_report(run).read_text()).text
    assert "8 images reconstructed exactly" in text and "1 image skipped" in text


def test_metrics_survive_resume_nulls_and_damaged_lines(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "a": 1.0}\n{"step": 2, "a": 5.0, "b": null}\n{"step": 3, "a": NaN}\n'
        '{"step": 2, "a": 2}\n{"step": 4, "a'
    )
    assert read_metrics(path) == {"a": [Point(1, 1.0), Point(2, 2.0)]}
    assert read_metrics(tmp_path / "none.jsonl") == {}
    path.write_text('{"step": 1, "a": 1.0}\nnonsense\n{"step": 2, "a": 5.0}\n')
    assert read_metrics(path) == {"a": [Point(1, 1.0), Point(2, 5.0)]}
    assert "line 2, is passed over" in caplog.text


def test_training_time_follows_the_logged_speed():
    speed = [Point(100, 10.0), Point(150, 20.0)]
    assert training_work({"images_per_second": speed}, 4) == pytest.approx((100 * 4 / 10 + 50 * 4 / 20, 150 * 4))
    assert training_work({"images_per_second": speed}, None) is None
    assert training_work({}, 4) is None
    speed, seconds = [*speed, Point(160, 30.0)], [Point(150, 7.0), Point(160, 2.0)]  # an earlier version began the run
    curves = {"images_per_second": speed, "training_seconds": seconds}
    assert training_work(curves, 4) == pytest.approx((40 + 7 + 2, 400 + 140 + 60))
    assert training_work(curves, None) is None


@pytest.mark.parametrize("divided", ["model.grids=[2x2,4x2]", "data.buckets=[32x64,64x32]", "data.pixels=[256,512]"])
def test_steps_of_several_sizes_count_by_what_was_logged(run, divided):
    config = OmegaConf.load(run / "config.yaml")
    config.merge_with_dotlist([divided])
    OmegaConf.save(config, run / "config.yaml")
    lines = [{"step": step, "images_per_second": 8 / 0.5, "training_seconds": 5.0} for step in range(10, 101, 10)]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    text = Page(write_report(run).read_text()).text
    assert "time in training steps50 s" in text
    assert "8 on average; at most 32 (trainer.global_batch_size)" in text
    former = [{key: line[key] for key in ("step", "images_per_second")} for line in lines]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in former))
    text = Page(write_report(run).read_text()).text
    assert "time in training steps" not in text and "at most 32" in text and "on average" not in text


@pytest.mark.parametrize(
    "chart, curve",
    [
        (Chart("log", "", {}, log=True), [Point(s, 10.0 ** (-s / 100)) for s in range(1, 1001)]),
        (Chart("log of zeros", "", {}, log=True), [Point(1, 0.0), Point(2, 0.0)]),
        (Chart("flat", "", {}), [Point(1, 3.0), Point(2, 3.0)]),
        (Chart("one point", "", {}), [Point(7, -2.0)]),
        (Chart("negative", "", {}), [Point(s, math.sin(s) * 1e-6) for s in range(50)]),
        (Chart("large", "", {}), [Point(s * 1000, s * 1e6) for s in range(50)]),
        (Chart("percent", "", {}, percent=True), [Point(s, 1.0) for s in range(5)]),
    ],
)
def test_every_mark_lies_within_the_chart(chart, curve):
    html = draw_chart(chart, {"curve": curve})
    quoted = re.sub(r"=([\w.-]+)(?=[\s/>])", r'="\1"', html)  # HTML allows bare attributes, XML does not
    figure = ElementTree.fromstring(quoted)
    svg = figure.find("svg")
    _, _, width, height = map(float, svg.get("viewBox").split())
    points = [tuple(map(float, pair.split(","))) for pair in svg.find("polyline").get("points").split()]
    assert 1 <= len(points) <= 240
    for x, y in points:
        assert 0 <= x <= width and 0 <= y <= height
    labels = [text.text for text in svg.findall("text")]
    assert "step" in labels and all(len(label) <= 7 for label in labels)
    values = [text.text for text in svg.findall("text") if text.get("x") == "42"]
    assert len(values) == len(set(values)) >= 2


@pytest.mark.parametrize(
    "break_it, message",
    [
        (lambda run: (run / "config.yaml").unlink(), "is not a run folder"),
        (lambda run: (run / "report.json").write_text("{"), "is not valid JSON"),
        (lambda run: (run / "report.html").mkdir(), "cannot write"),
    ],
)
def test_mistakes_are_one_clear_line(run, break_it, message):
    break_it(run)
    assert message in refusal(TrainerError, write_report, run)
