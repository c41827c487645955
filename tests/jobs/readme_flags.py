"""Flags that the README pages explain in their text: a command that has them, for test_readme_commands.py."""

_TRAIN = "jobs/train.py --preset cifar10 --dataset artifacts/photos/dataset"
_SAMPLE = "jobs/sample.py --model models:/photos@candidate --output artifacts/photos/samples"
# Flags that the text explains: a command that has them.
WITH_FLAGS = {
    "--throughput": f"{_TRAIN} --throughput 800 --price-per-device-hour 2.5",
    "--price-per-device-hour": f"{_TRAIN} --throughput 800 --price-per-device-hour 2.5",
    "--precision bf16 --channels-last --compile": f"{_TRAIN} --precision bf16 --channels-last --compile",
    "--precision bf16 --channels-last": f"{_SAMPLE} --precision bf16 --channels-last",
    "--validation.interval-s": f"{_TRAIN} --validation.interval-s 60",
    "--validation.num-images": f"{_TRAIN} --validation.num-images 0",
    "--profile 5": f"{_TRAIN} --profile 5",
    "--optimizer.ema-ramp-up-ratio None": f"{_TRAIN} --optimizer.ema-ramp-up-ratio None",
    "--image-size 24x40": "jobs/prepare_data.py --source photos --dataset x --image-size 24x40",
    "--resize-mode": "jobs/prepare_data.py --source photos --dataset x --image-size 24 --resize-mode pad",
    "--min-size 64": "jobs/prepare_data.py --source photos --dataset x --image-size 24 --min-size 64",
    "--exclude GLOB": "jobs/prepare_data.py --source photos --dataset x --image-size 24 --exclude GLOB",
    "--exclude a --exclude b": (
        "jobs/prepare_data.py --source photos --dataset x --image-size 24 --exclude a --exclude b"
    ),
    "--allow-empty-classes": "jobs/prepare_data.py --source photos --dataset x --image-size 24 --allow-empty-classes",
    "--held-out-fraction 0": "jobs/prepare_data.py --preset cifar10 --held-out-fraction 0",
    "--class-conditional": f"{_TRAIN} --class-conditional",
    "--label-drop 0.1": f"{_TRAIN} --class-conditional --label-drop 0.1",
    "--dry-run": f"{_TRAIN} --dry-run",
    "--resume": f"{_TRAIN} --resume",
    "--resume --new-run": f"{_TRAIN} --resume --new-run",
    "--new-run": f"{_TRAIN} --resume --new-run",
    "--if-held leave": f"{_TRAIN} --if-held leave",
    "--lease-s": f"{_TRAIN} --lease-s 30",
    "--num-images 10": f"{_SAMPLE} --num-images 10",
    "--use-gpu --accelerator-type H100": (
        f"{_SAMPLE} --use-gpu --accelerator-type H100 --cluster.address 10.0.0.1:6379"
    ),
    "--seed": f"{_SAMPLE} --seed 3",
    "--if-held fail": f"{_SAMPLE} --tick 2026-11-22T03:00Z --if-held fail",
    "--keep-last": f"{_SAMPLE} --tick 2026-11-22T03:00Z --keep-last 7",
    "--price-per-gb": f"{_SAMPLE} --throughput 800 --price-per-gb 0.02",
    "--shard-timeout-s": f"{_SAMPLE} --shard-timeout-s 3600",
    "--max-shard-retries": f"{_SAMPLE} --max-shard-retries 1",
    "--idle-limit-s": f"{_SAMPLE} --idle-limit-s 600",
    "--format.name webp": f"{_SAMPLE} --format.name webp",
    "--format.name jpeg --format.quality 90": f"{_SAMPLE} --format.name jpeg --format.quality 90",
    "--container parquet": f"{_SAMPLE} --container parquet",
    "--gallery-images": f"{_SAMPLE} --gallery-images 0",
    "--sampler.name heun": f"{_SAMPLE} --sampler.name heun",
    "--sampler.name": f"{_SAMPLE} --sampler.name ddim",
    "--sampler.churn 10": f"{_SAMPLE} --sampler.name heun --sampler.churn 10",
    "--request.name inpaint --request.mask lower_half --request.inputs artifacts/photos/dataset": (
        f"{_SAMPLE} --request.name inpaint --request.mask lower_half --request.inputs artifacts/photos/dataset"
    ),
    "--guide-model": f"{_SAMPLE} --guide-model models:/photos/1 --sampler.guidance-scale 1.5",
    "--calibration": (
        "jobs/sample.py --model models:/ddpm-digits/2 --sampler.name ancestral --sampler.variance analytic "
        "--calibration artifacts/digits/train/calibration.json"
    ),
    "--post-hoc-ema.snapshot-interval-steps": f"{_TRAIN} --post-hoc-ema.snapshot-interval-steps 100",
    "--trust-model-code": f"{_SAMPLE} --trust-model-code",
    "--traceback": f"{_TRAIN} --traceback",
    "--tracking.uri": f"{_TRAIN} --tracking.uri sqlite:///artifacts/mlflow.db",
    "--gradient-checkpointing": f"{_TRAIN} --gradient-checkpointing",
    "--workers.hang-timeout-s": f"{_TRAIN} --workers.hang-timeout-s 900",
    "--workers.max-failures": f"{_TRAIN} --workers.max-failures 5",
    "--workers.min-workers": f"{_TRAIN} --workers.min-workers 1",
    "--micro-batch": f"{_TRAIN} --micro-batch 8",
    "--workers.resize-interval-s": f"{_TRAIN} --workers.resize-interval-s 60",
    "--stop-after": f"{_TRAIN} --stop-after 90min",
    "--stop-after 4h": f"{_TRAIN} --stop-after 4h",
    "--max-skipped-batches": f"{_TRAIN} --max-skipped-batches 10",
    "--skip-window-steps": f"{_TRAIN} --skip-window-steps 100",
    "--network.name own --network.factory package.module:factory": (
        f"{_TRAIN} --network.name own --network.factory package.module:factory"
    ),
    "--network.learned-variance": f"{_TRAIN} --network.learned-variance --objective.name hybrid",
    "--output artifacts/digits/hybrid --network.learned-variance --objective.name hybrid": (
        "jobs/train.py --steps 2000 --output artifacts/digits/hybrid --network.learned-variance --objective.name hybrid"
    ),
    "--sample.request.name inpaint --sample.request.mask lower_half --sample.request.split held_out "
    "--sample.request.inputs artifacts/digits/dataset": (
        "jobs/evaluate.py --sample.request.name inpaint --sample.request.mask lower_half "
        "--sample.request.split held_out --sample.request.inputs artifacts/digits/dataset"
    ),
}
