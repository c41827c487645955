"""The shapes in the annotations are true: beartype checks them while the package does its work.

In a process of its own, because the checks are put in when the package is imported.
"""

import subprocess
import sys
from pathlib import Path

SCRIPT = """
from jaxtyping import TypeCheckError, install_import_hook
install_import_hook("ddpm", "beartype.beartype")
import torch
torch.set_num_threads(1)
import ddpm

schedule = ddpm.make_schedule(ddpm.ScheduleConfig(name="cosine", num_timesteps=50))
config = ddpm.UNetConfig(base_channels=8, channel_multipliers=(1, 2), num_res_blocks=1, num_groups=4,
                         attention_resolutions=(4,))
network = ddpm.UNet(config, image_size=8, channels=3, num_classes=4)
ids = torch.arange(5)
x_0 = ddpm.images_to_x_0(torch.zeros(5, 8, 8, 3, dtype=torch.uint8))
batch = ddpm.make_training_batch(schedule, x_0, ids % 4, seed=0, sample_ids=ids, epochs=ids, flip=True, label_drop=0.1,
                                 null_label=4)
ddpm.per_sample_loss(network, batch).mean().backward()
ddpm.Ema(network, 1000).update(network, 5)
network.eval()
for sampler in (ddpm.SamplerConfig(num_steps=3), ddpm.SamplerConfig(name="ancestral", num_steps=3)):
    images = ddpm.x_0_to_images(
        ddpm.generate(network, schedule, sampler, seed=0, sample_ids=ids, label=ids % 4, image_shape=(3, 8, 8)))
moments = ddpm.Moments.from_samples(images.flatten(1).float())
ddpm.frechet_distance(moments + moments, moments)

t = torch.zeros(5, dtype=torch.int64)
wrong = {
    "t is not int": lambda: ddpm.q_sample(schedule, x_0, t.float(), x_0),
    "t is shorter": lambda: ddpm.q_sample(schedule, x_0, t[:4], x_0),
    "x_0 has no batch": lambda: ddpm.q_sample(schedule, x_0[0], t, x_0[0]),
    "images are float": lambda: ddpm.images_to_x_0(x_0),
}
for name, call in wrong.items():
    try:
        call()
    except TypeCheckError:
        continue
    raise SystemExit(f"{name}: not noticed")
"""


def test_annotated_shapes_hold() -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
