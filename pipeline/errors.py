"""Errors that an operator acts on: one line that names the field, file or value and says what to do next.

PipelineError                      exit code 1
├── StoppedError                   exit code 3: ended because it was asked to; --resume goes on
├── UsageError                     exit code 2: the command or its configuration is wrong
│   ├── ConfigError                a field, a file or a flag has an impossible value
│   ├── FormatVersionError         a stored file is of another version of its format; it is not damaged
│   ├── DatasetMissingError        no dataset, or no images, where one was named
│   ├── ModelMissingError          no model where one was named
│   ├── UntrustedCodeError         a model brings code of its own, and nobody said that it may run
│   └── OutputExistsError          the output holds something else; nothing was changed
├── StorageError                   object storage gave no usable answer until patience ended
│   ├── ObjectMissingError         the key does not exist
│   ├── StorageAccessError         refused: credentials, permission, bucket, folder, disk
│   └── StorageUnfitError          the store does not do what create-once needs
├── DatasetError                   the dataset is there and cannot be used
│   ├── ShardCorruptError          size, sha256 or count of a shard differ from the manifest
│   └── UndecodableImageError      more source images than allowed do not decode
├── CheckpointError                no usable checkpoint
├── LeaseHeldError                 another driver works in this output
├── LeaseLostError                 another driver took over; this one stops
├── TrackingUnavailableError       the MLflow server does not answer
├── CommitConflictError            two different results for one output shard
├── TrainingDivergedError          loss or gradients are not finite, too often
└── TrainingFailedError            workers died more often than allowed

No text of these holds the password of a URI (redact.py), whatever quoted it.

Callers' mistakes inside the program are ValueError, broken invariants are assert; neither is in this tree.
"""

from pipeline.redact import redact


class PipelineError(Exception):
    """Base of all errors that end a job with one line instead of a traceback."""

    exit_code = 1
    said_as = "error"
    """What stands before the message on the terminal."""

    def __init__(self, message: str = "") -> None:
        """Keep the message, redacted."""
        super().__init__(redact(message))


class StoppedError(PipelineError):
    """Ended because it was asked to, after a checkpoint if there was anything to save."""

    exit_code = 3
    said_as = "stopped"


class UsageError(PipelineError):
    """The command or its configuration is wrong."""

    exit_code = 2


class ConfigError(UsageError):
    """A field, a file or a flag has an impossible value."""


class FormatVersionError(UsageError):
    """A stored file is of another version of its format than this program reads; it is not damaged."""


class DatasetMissingError(UsageError):
    """No dataset, or no images, where one was named."""


class ModelMissingError(UsageError):
    """No model where one was named."""


class UntrustedCodeError(UsageError):
    """A model brings code of its own, and nobody said that it may run."""


class OutputExistsError(UsageError):
    """The output holds something else; nothing was changed."""


class StorageError(PipelineError):
    """Object storage gave no usable answer until patience ended."""


class ObjectMissingError(StorageError):
    """The key does not exist."""


class StorageAccessError(StorageError):
    """Refused: credentials, permission, bucket, folder or disk."""


class StorageUnfitError(StorageError):
    """The store does not do what create-once needs: it ignores conditions, or takes them for something else."""


def is_outage(error: BaseException) -> bool:
    """Whether storage did not answer for minutes, and may in an hour; what it refuses or lacks it will again."""
    lasting = ObjectMissingError | StorageAccessError | StorageUnfitError
    return isinstance(error, StorageError) and not isinstance(error, lasting)


class DatasetError(PipelineError):
    """The dataset is there and cannot be used."""


class ShardCorruptError(DatasetError):
    """Size, sha256 or sample count of a shard differ from the manifest, or its archive is malformed."""


class UndecodableImageError(DatasetError):
    """More source images than allowed do not decode."""


class CheckpointError(PipelineError):
    """No usable checkpoint."""


class LeaseHeldError(PipelineError):
    """Another driver works in this output; nothing was changed."""


class LeaseLostError(PipelineError):
    """Another driver took over this output, so this one stops."""


class TrackingUnavailableError(PipelineError):
    """The MLflow server does not answer."""


class CommitConflictError(PipelineError):
    """Two different results for one output shard."""


class TrainingDivergedError(PipelineError):
    """Loss or gradients are not finite, too often."""


class TrainingFailedError(PipelineError):
    """Training workers died more often than allowed."""
