"""The results of a generation evaluation, and the files that hold them."""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

from trainer.evaluation import reference_results
from trainer.files import ReportFiles, has_keys, json_text, write_files
from trainer.reports.measures import Measure, describe_seconds, markdown_table, plain_markdown

SPLITS = 10  # of the Inception score
MEASURES = {  # by key of the report and of published.yaml
    "gfid": Measure("gFID"),
    "inception_score": Measure("Inception score"),
    "precision": Measure("precision", ".4f"),
    "recall": Measure("recall", ".4f"),
}


@dataclass(frozen=True)
class GenerationReport:
    """Values are None if not measured. inception_score_std: over the splits. reference_count: images for precision and
    recall. reference_statistics: where gFID's come from. not_measured: key of MEASURES -> reason."""

    gfid: float | None
    inception_score: float | None
    inception_score_std: float | None
    precision: float | None
    recall: float | None
    sample_count: int
    reference_count: int
    reference_statistics: str
    protocol: str
    not_measured: dict[str, str]
    warnings: list[str]
    provenance: dict

    def to_json(self) -> dict:
        """The content of FILE.json. "manifest" is the key that former versions wrote and that users' scripts read."""
        content = asdict(self)
        content["manifest"] = content.pop("provenance")
        return content

    @classmethod
    def from_json(cls, content: dict) -> "GenerationReport":
        """The report that `to_json` gave. Raises KeyError for content of another version."""
        names = [field.name for field in fields(cls) if field.name != "provenance"]
        return cls(**{name: content[name] for name in names}, provenance=content["manifest"])

    def formatted(self) -> list[str]:
        """The values of MEASURES as text."""
        return [measure.format_measured(getattr(self, key)) for key, measure in MEASURES.items()]


class EvaluatedGeneration(NamedTuple):
    """comparison: rows of text with published results, the first one headings."""

    report: GenerationReport
    comparison: list[list[str]]
    json_path: Path
    markdown_path: Path


def comparison_table(report: GenerationReport) -> list[list[str]]:
    """Headings, the measured values, and the published results."""
    rows = reference_results.reference_rows("imagenet_generation")
    return reference_results.comparison_table(vars(report), rows, MEASURES, "**measured here**")


MARK = "# Generation: "  # of FILE.md


def report_files(json_path: Path) -> ReportFiles:
    """The files of a report of generation."""
    return ReportFiles(json_path, has_keys("gfid", "manifest"), json_path.with_suffix(".md"), MARK)


def write_evaluated_generation(evaluated: EvaluatedGeneration) -> None:
    """Writes FILE.md and, last, FILE.json."""
    contents = {
        evaluated.markdown_path: to_markdown(evaluated),
        evaluated.json_path: json_text(evaluated.report.to_json()),
    }
    write_files(contents, "--report")


def to_markdown(evaluated: EvaluatedGeneration) -> str:
    """The report: measured and published results, and how it was measured."""
    report, provenance = evaluated.report, evaluated.report.provenance
    notes = [f"Warning: {warning}." for warning in report.warnings]
    notes += [f"{MEASURES[measure].title} was not measured: {why}." for measure, why in report.not_measured.items()]
    if report.inception_score is not None:
        notes.append(
            f"Standard deviation of the Inception score over {SPLITS} splits: {report.inception_score_std:.2f}."
        )
    notes.append("Published: ImageNet 256 x 256, 50,000 samples, 50 of each class, ADM's reference batch.")
    samples, weights = provenance["samples"], provenance["weights_files"]["inception"]
    order = provenance["order"].replace("SEED", str(provenance["seed"])).replace("COUNT", str(report.sample_count))
    facts = {
        "protocol": report.protocol,
        "samples": f"{samples['path']}, SHA-256 {samples['sha256'][:16]}, {samples['width']} x {samples['height']}",
        "gFID's reference": report.reference_statistics,
        "order": order,
        "weights": f"{Path(weights['file']).name}, SHA-256 {weights['sha256'][:16]}",
        "machine": f"{provenance['environment']['device']}, {provenance['processes']} processes",
        "seconds": describe_seconds(provenance["seconds"]),
    }
    if samples["sampling"]:
        facts["sampling"] = ", ".join(f"{name} {value}" for name, value in samples["sampling"].items())
    parts = [
        f"{MARK}{report.sample_count:,} samples",
        markdown_table(evaluated.comparison),
        "\n".join(f"- {plain_markdown(note)}" for note in notes),
        "## Provenance",
        "\n".join(f"- {name}: {plain_markdown(fact)}" for name, fact in facts.items()),
    ]
    return "\n\n".join(parts) + "\n"
