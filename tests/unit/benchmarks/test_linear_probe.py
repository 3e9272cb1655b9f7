"""The linear probe of codes: on features with a known answer, and on a tiny run."""

import json

import pytest
import torch
from model_checks import tokenizer_of
from PIL import Image
from samples import encoded, write_tar
from scipy.optimize import minimize
from scipy.special import logsumexp
from support import write_tokenizer_run

from benchmarks.claims.linear_probe import Pictures, encode, fit, main, predict, probe
from data import DataError, evaluation_images

COLOURS = [(200, 40, 40), (40, 200, 40), (40, 40, 200)]


def clusters(count: int, spread: float, seed: int = 0) -> Pictures:
    """Three classes (1, 4, 7) around the corners of a triangle in 5 dimensions."""
    generator = torch.Generator().manual_seed(seed)
    number_n = torch.arange(count) % 3
    x_nd = torch.eye(5)[number_n] + spread * torch.randn(count, 5, generator=generator)
    return Pictures(x_nd.double(), 1 + 3 * number_n, 20.0)


def test_the_classifier_is_the_minimum_that_scipy_finds():
    train = clusters(60, 0.6)
    number_n = (train.label_n - 1) // 3
    weights = fit(train.pooled_nd, number_n, 3, penalty=0.01)
    x, label = train.pooled_nd.numpy(), number_n.numpy()

    def objective(flat):
        rows, bias = flat[:15].reshape(5, 3), flat[15:]
        logits = x @ rows + bias
        return (logsumexp(logits, axis=1) - logits[range(60), label]).mean() + 0.01 / 2 * (rows**2).sum()

    found = minimize(objective, [0.0] * 18, method="BFGS", options={"gtol": 1e-7})
    assert objective(weights.numpy().flatten()) == pytest.approx(found.fun, abs=1e-9)
    expected = torch.from_numpy(found.x[:15]).reshape(5, 3)
    torch.testing.assert_close(weights[:-1], expected, rtol=1e-3, atol=1e-4)
    assert predict(weights, train.pooled_nd).tolist() == (x @ expected.numpy() + found.x[15:]).argmax(1).tolist()


def test_separable_classes_are_told_and_noise_is_not():
    assert probe(clusters(60, 0.05), clusters(30, 0.05, seed=1))["accuracy"] == 1
    noise = clusters(300, 100.0), clusters(300, 100.0, seed=1)
    assert probe(*noise)["accuracy"] < 0.45


def test_classes_of_other_sizes():
    train, test = clusters(60, 0.05), clusters(30, 0.05, seed=1)
    keep = (test.label_n != 7) | (torch.arange(30) < 3)
    rare = Pictures(test.pooled_nd[keep].clone(), test.label_n[keep], 20.0)
    rare.pooled_nd[rare.label_n == 7] = torch.eye(5, dtype=torch.float64)[0]  # looks like class 1
    found = probe(train, rare)
    assert found["accuracy"] == pytest.approx(20 / 21) and found["balanced"] == pytest.approx(2 / 3)
    assert found["majority"] == pytest.approx(10 / 21)


def test_a_class_without_training_pictures_is_refused():
    train = clusters(60, 0.05)
    few = train.label_n != 4
    with pytest.raises(DataError, match="none of class 4"):
        probe(Pictures(train.pooled_nd[few], train.label_n[few], 20.0), clusters(30, 0.05))


@pytest.fixture
def tars(tmp_path):
    """24 pictures of three colours, their class the colour, in two tars."""

    def tar(name: str, numbers: range) -> str:
        samples = []
        for number in numbers:
            colour = tuple(value + 3 * number % 20 for value in COLOURS[number % 3])
            picture = encoded(Image.new("RGB", (16, 16), colour), "PNG")
            samples.append({"__key__": f"{number:02d}", "png": picture, "cls": str(number % 3).encode()})
        return write_tar(tmp_path / name, samples)

    return tar("train.tar", range(15)), tar("test.tar", range(15, 24))


def test_features_are_means_of_code_vectors(tars):
    tokenizer = tokenizer_of(codebook_size=64).eval()
    found = encode(tokenizer, evaluation_images(tars[0], image_size=16), "cpu")
    assert found.label_n.tolist() == [number % 3 for number in range(15)]
    first = next(iter(evaluation_images(tars[0], image_size=16))).image_chw[None].float() / 127.5 - 1
    index_n = tokenizer.tokenize(first).flatten()
    expected = tokenizer.quantize.embedding.weight[index_n].mean(0)
    torch.testing.assert_close(found.pooled_nd[0].float(), expected.detach())


def test_runs_are_measured_and_printed(tars, tmp_path, capsys):
    for seed in range(2):
        write_tokenizer_run(tmp_path / f"seed_{seed}", tokenizer_of(seed, codebook_size=256))
    train, test = tars
    out = tmp_path / "out.json"
    words = [f"random={tmp_path}/seed_*", "--train", train, "--test", test, "--size", "16", "--out", str(out)]
    main(words)
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| random | 2 |")]
    runs = json.loads(out.read_text())["random"]
    assert [run["test_pictures"] for run in runs] == [9, 9] and "±" in row
    assert all(run["accuracy"] > 0.6 for run in runs)  # colours are told by random codes too


def test_pictures_without_a_class_are_refused(tmp_path, capsys):
    write_tokenizer_run(tmp_path / "run", tokenizer_of())
    tar = write_tar(tmp_path / "a.tar", [{"__key__": "0", "png": encoded(Image.new("RGB", (16, 16)), "PNG")}])
    with pytest.raises(SystemExit) as exited:
        main([f"a={tmp_path / 'run'}", "--train", tar, "--test", tar, "--size", "16"])
    assert exited.value.code == 2 and "0 has no class" in capsys.readouterr().err
