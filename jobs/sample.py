"""Make images with a model: `python jobs/sample.py --model models:/ddpm-digits@candidate`."""

import sys

from jobs.cli import Job, run_job
from pipeline.errors import LeaseHeldError
from pipeline.generation.sample import sample
from pipeline.generation.sample_config import SampleConfig
from pipeline.generation.sample_preview import describe_plan
from pipeline.progress import say


def _run(config: SampleConfig) -> None:
    tick = "" if config.tick_utc is None else f"tick {config.tick_utc}: "
    try:
        made = sample(config)
    except LeaseHeldError as held:
        if not config.leaves_if_held:
            raise
        say(f"left: {tick}{held}")
        return
    now = f"{made.num_made:,} made now" if made.num_made else "all of them there already, nothing written"
    shown = [("contact sheet", made.contact_sheet_uri), ("gallery", made.gallery_uri)]
    pictures = "".join(f"; {name} {uri}" for name, uri in shown if uri is not None)
    failed = f"; {made.num_pictures_failed} of the pictures could not be made" if made.num_pictures_failed else ""
    say(f"done: {tick}{made.manifest.num_images:,} images ({now}) in {made.store.uri}{pictures}{failed}")


JOB = Job(section="sample", reads=("sample",), of_preset=lambda preset: preset.sample, run=_run, describe=describe_plan)

if __name__ == "__main__":
    sys.exit(run_job(JOB, sys.argv[1:]))
