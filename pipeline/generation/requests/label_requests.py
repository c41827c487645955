"""Which labels a request asks for, checked against the model before any work."""

import hashlib
from dataclasses import dataclass

from pipeline.errors import ConfigError, ObjectMissingError
from pipeline.generation.requests.class_names import ClassNames
from pipeline.generation.requests.label_file import FIELD, parse_label_plan
from pipeline.generation.requests.requests import Generate, Request
from pipeline.generation.spec.labels import (
    AnyLabelRule,
    IdModuloChosenClasses,
    IdModuloClasses,
    LabelPlan,
    PlannedLabels,
)
from pipeline.models.model_files import ModelCard
from pipeline.stores.storage import read_file


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LabelRequest:
    """The labels of a request, resolved."""

    rule: AnyLabelRule
    """What of it decides the images."""
    plan: LabelPlan | None = None
    """The rows that a label plan names by the digest of their file."""
    text: str | None = None
    """What it asks for, in words; None: all classes in turn, or as an edit's inputs have them."""

    @property
    def num_images(self) -> int | None:
        """Images that it asks for; None where the number is the caller's choice."""
        return None if self.plan is None else len(self.plan)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What may make figures of the images wrong, one line each: real images are of all classes."""
        if self.text is None:
            return ()
        return (f"the images have the labels {self.text}, real images those of all classes: distances compare the two",)


def resolve_labels(request: Request, card: ModelCard, model_uri: str) -> LabelRequest:
    """Look up the classes, or the file, that a request names; for an edit, which has its own labels, all classes.

    Raises:
        ConfigError: If the model has no classes to choose from, a class is unknown or named twice, or a file is missing
            or a line of it not as it must be.
        StorageError: If a file cannot be read.
    """
    if not isinstance(request, Generate):
        return LabelRequest(rule=IdModuloClasses())
    classes = ClassNames(card, model_uri)
    if request.label_plan is not None:
        return _read_plan(request.label_plan, classes)
    if not request.classes:
        return LabelRequest(rule=IdModuloClasses())
    chosen = classes.choose(request.classes, "request.classes")
    if chosen == tuple(range(classes.num_classes or 0)):  # the same images, so the same run
        return LabelRequest(rule=IdModuloClasses())
    names = [card.class_names[k] if card.class_names else str(k) for k in chosen]
    return LabelRequest(rule=IdModuloChosenClasses(classes=chosen), text=f"{', '.join(names)}, in turn")


def _read_plan(uri: str, classes: ClassNames) -> LabelRequest:
    classes.check_any(FIELD)
    try:
        data = read_file(uri)
    except ObjectMissingError:
        raise ConfigError(f"{FIELD}: there is no such file, got {uri}; name one that is there") from None
    plan = parse_label_plan(data, uri, classes)
    rule = PlannedLabels(file_sha256=hashlib.sha256(data).hexdigest(), num_rows=len(plan))
    return LabelRequest(rule=rule, plan=plan, text=f"{len(plan):,} rows of {uri}, sha256 {rule.file_sha256[:16]}...")
