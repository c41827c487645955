"""Classes as people write them: by the names on the model's card, or by number."""

from collections.abc import Sequence

from pipeline.errors import ConfigError
from pipeline.models.model_files import ModelCard

_LISTED = 5


class ClassNames:
    """The classes of one model, by what they are called.

    A text is a class's name, or if it is none, its number; a whole number is always the number. So a dataset whose
    folders are called 1, 2, 3 is asked for by what its folders are called, though the first of them is number 0.
    """

    def __init__(self, card: ModelCard, model_uri: str) -> None:
        """Know the classes of a model.

        Args:
            card: The model's card.
            model_uri: What messages call the model.
        """
        self._model_uri = model_uri
        self._names = card.class_names
        self.num_classes = card.config.num_classes
        numbers = {str(k): k for k in range(self.num_classes or 0)}
        self._by_text = {**numbers, **{name: k for k, name in enumerate(card.class_names)}}

    def check_any(self, field: str) -> None:
        """Refuse a choice among the classes of a model that has none.

        Raises:
            ConfigError: Names the field.
        """
        if self.num_classes is None:
            raise ConfigError(f"{field}: {self._model_uri} has no classes; leave it out, or choose another model")

    def find(self, label: str | int) -> int | None:
        """The class of this name or number; None if there is none."""
        if isinstance(label, int):
            return label if 0 <= label < (self.num_classes or 0) else None
        return self._by_text.get(label)

    def choose(self, asked: Sequence[str | int], field: str) -> tuple[int, ...]:
        """The classes of a choice, in its order; a text that is no class is split at its commas.

        Raises:
            ConfigError: If the model has no classes, one is unknown, or one is named twice.
        """
        self.check_any(field)
        words: list[str | int] = []
        for word in asked:
            whole = isinstance(word, int) or self.find(word) is not None
            words += [word] if whole else [part.strip() for part in str(word).split(",")]
        chosen: dict[int, str | int] = {}
        for word in words:
            found = self.find(word)
            if found is None:
                raise ConfigError(f"{field}: {self._model_uri} has the classes {self}, got {word!r}; choose of these")
            if found in chosen:
                raise ConfigError(
                    f"{field}: each class once, got number {found} twice, as {chosen[found]!r} and as {word!r}; "
                    "leave one out"
                )
            chosen[found] = word
        return tuple(chosen)

    def __str__(self) -> str:
        """What may be written, shortened."""
        numbers = f"0 to {(self.num_classes or 0) - 1}"
        if not self._names:
            return numbers
        more = ", ..." if len(self._names) > _LISTED else ""
        return f"{', '.join(self._names[:_LISTED])}{more} (or {numbers})"
