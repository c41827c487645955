"""What of a run is for people, contact sheet and gallery: its images are there whether they can be made or not."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from pipeline.generation.output.manifest import GenerationManifest
from pipeline.generation.sample_config import SampleConfig
from pipeline.generation.sample_job import SampleJob
from pipeline.generation.viewing.contact_sheet import CONTACT_SHEET_KEY, contact_sheet, write_contact_sheet
from pipeline.generation.viewing.gallery import Lineage, gallery_stands, make_gallery
from pipeline.progress import say
from pipeline.redact import redact
from pipeline.stores.object_store import one_line

_SHEET, _GALLERY = "contact sheet", "gallery"


@dataclass(kw_only=True, slots=True)
class Pictures:
    """Which pictures of a run could not be made."""

    failed: list[str] = field(default_factory=list)
    """What lines call them."""

    @property
    def has_contact_sheet(self) -> bool:
        """Whether the contact sheet is as it should be."""
        return _SHEET not in self.failed

    @property
    def has_gallery(self) -> bool:
        """Whether the gallery is as it should be, where one is wanted."""
        return _GALLERY not in self.failed

    @contextlib.contextmanager
    def attempt(self, name: str, uri: str) -> Iterator[None]:
        """Make one in the block; whatever goes wrong there is a line, and counted."""
        try:
            yield
        except Exception as error:
            self.failed.append(name)
            reason = redact(one_line(error) or type(error).__name__)
            say(
                f"the {name} could not be made ({reason}); the run goes on, and running again makes it; whether images "
                f"were altered or lost jobs/output.py verify {uri} tells, and repair mends them"
            )


def make_pictures(config: SampleConfig, job: SampleJob, manifest: GenerationManifest) -> Pictures:
    """Make what is not up to date.

    Args:
        config: What is asked for.
        job: What that comes to.
        manifest: That of the finished run.
    """
    pictures = Pictures()
    with pictures.attempt(_SHEET, job.store.uri):
        write_contact_sheet(job.store, job.edit, config.contact_sheet_columns)
    with pictures.attempt(_GALLERY, job.store.uri):
        make_gallery(job.store, _lineage(job, manifest), config.gallery_images)
    return pictures


def pictures_stand(config: SampleConfig, job: SampleJob) -> bool:
    """Whether the pictures of a finished run are up to date; writes nothing. What cannot be told is not."""
    manifest = job.manifest
    assert manifest is not None, "asked of a finished run alone"
    try:
        sheet = contact_sheet(manifest, job.edit, job.store, config.contact_sheet_columns)
        return job.store.read(CONTACT_SHEET_KEY) == sheet and gallery_stands(
            job.store, manifest, _lineage(job, manifest), config.gallery_images
        )
    except Exception:  # whoever makes them says what it is
        return False


def _lineage(job: SampleJob, manifest: GenerationManifest) -> Lineage:
    version = job.model.version if job.model.uri == manifest.model_uri else None
    return Lineage(
        model_uri=manifest.model_uri,  # the first name: the same model under another is no reason to write
        guide_uri=manifest.guide_uri,
        run_id=None if version is None else version.run_id,
        dataset_digest=job.card.dataset_digest,
    )
