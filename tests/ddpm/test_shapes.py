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
from ddpm.process.spacing import continuous_timesteps

schedule = ddpm.make_schedule(ddpm.ScheduleConfig(name="cosine", num_timesteps=50))
config = ddpm.UNetConfig(base_channels=8, channel_multipliers=(1, 2), num_res_blocks=1, num_groups=4,
                         attention_resolutions=(4,))
network = ddpm.UNet(config, image_size=(8, 8), channels=3, num_classes=4)


def model_of(network, **options):
    return ddpm.DiffusionModel(network=network, schedule=schedule, image_shape=(3, 8, 8), **options)


model = model_of(network, null_label=4)
ids = torch.arange(5)
x_0 = ddpm.images_to_x_0(torch.zeros(5, 8, 8, 3, dtype=torch.uint8))
fine = ddpm.images_to_x_0(torch.zeros(5, 8, 8, 3, dtype=torch.uint16), 65536)
assert ddpm.x_0_to_images(fine, 65536).dtype == torch.uint16
batch = ddpm.make_training_batch(model, x_0, ids % 4, seed=0, sample_ids=ids, epochs=ids, flip=True, label_drop=0.1)
ddpm.per_sample_loss(model, batch).mean().backward()
adm = ddpm.UNetConfig(base_channels=8, channel_multipliers=(1, 2), num_res_blocks=1, num_groups=4, num_head_channels=4,
                      attention_resolutions=(4,), adaptive_group_norm=True, residual_resampling=True)
dit = ddpm.DiTConfig(hidden_size=16, depth=2, num_heads=2)
for own in (adm, dit):
    described = ddpm.ModelConfig(network=own, image_size=(8, 8), channels=3, num_classes=4)
    other = ddpm.DiffusionModel.of(described, ddpm.build_network(described, gradient_checkpointing=True))
    noised = ddpm.make_training_batch(other, x_0, ids % 4, seed=0, sample_ids=ids, epochs=ids, flip=False,
                                      label_drop=0.0)
    ddpm.per_sample_loss(other, noised).mean().backward()
    other.network(x_0, ids.double() + 0.5)
    wide = ddpm.build_model(ddpm.ModelConfig(network=own, image_size=(8, 16), channels=3, num_levels=65536))
    ddpm.generate(wide, ddpm.DDIM(num_steps=2), seed=0, sample_ids=ids, label=None)
ddpm.Ema(network, 1000).update(network, 5)
ddpm.EmaBank(network, (10, 1000), ramp_up_ratio=0.05).update(network, 5)
tracked = ddpm.PowerEma(network, 0.1)
for _ in range(2):
    tracked.update(network, 5)
profiles = [ddpm.PowerProfile(num_images=5 * k, sigma_rel=0.1) for k in (1, 2)]
fit = ddpm.fit_post_hoc_ema(profiles, ddpm.PowerProfile(num_images=10, sigma_rel=0.2))
ddpm.combine_snapshots(network, [tracked.state_dict()] * 2, fit.weights)
sampler_of_t = ddpm.ImportanceSampler(50)
for chosen in (ddpm.stratified_timesteps(50, seed=0, step=3, slots=ids, global_batch=8),
               sampler_of_t.draw(seed=0, step=3, slots=ids)):
    batch = ddpm.make_training_batch(model, x_0, None, seed=0, sample_ids=ids, epochs=ids, flip=False, label_drop=0.0,
                                     timesteps=chosen)
    sampler_of_t.update(batch.t, batch.weight)
    for learned, objective in [(False, ddpm.ObjectiveConfig(name="vlb")),
                               (True, ddpm.ObjectiveConfig(name="hybrid", weighting="min_snr"))]:
        zeros = lambda x_t, t, label: torch.cat([0 * x_t] * (2 if learned else 1), dim=1)
        ddpm.per_sample_loss(model_of(zeros, prediction_type="v", learned_variance=learned), batch,
                             objective=objective)
network.eval()
bound = ddpm.bound_of_images(model, ddpm.LikelihoodConfig(num_steps=4), seed=0, sample_ids=ids, x_0=x_0,
                             label=ids % 4)
stratified = ddpm.LikelihoodConfig(terms="stratified", terms_per_image=2, num_steps=4)
ddpm.bound_of_images(model, stratified, seed=0, sample_ids=ids, x_0=x_0, label=ids % 4)
few = ddpm.LikelihoodConfig(terms="importance", terms_per_image=2, num_steps=4)
statistics = ddpm.BoundStatistics.of(bound) + ddpm.BoundStatistics.of(bound)
ddpm.bound_of_images(model, few, seed=0, sample_ids=ids, x_0=x_0, label=ids % 4, probabilities=statistics.importance())
ddpm.probability_flow_bound(model, seed=0, sample_ids=ids, x_0=x_0, label=ids % 4, num_steps=4)


def told(step, t, x_t, x_0_hat):
    assert x_t.shape == x_0_hat.shape == (5, 3, 8, 8) and t.shape == (5,)


for sampler in (ddpm.DDIM(num_steps=3), ddpm.Ancestral(num_steps=3),
                ddpm.DPMSolver2M(num_steps=3, guidance_scale=2.0, guidance_rescale=0.5),
                ddpm.DPMSolver2MSDE(num_steps=3, dynamic_threshold=0.9, spacing="log_snr"),
                ddpm.DPMSolver3M(num_steps=3, spacing="trailing"), ddpm.DPMSolver3MCommon(num_steps=3),
                ddpm.Heun(num_steps=3, churn=5.0, guidance_scale=2.0, guidance_interval=(0.1, 9.0))):
    sampler.num_evaluations(schedule)
    images = ddpm.x_0_to_images(
        ddpm.generate(model, sampler, seed=0, sample_ids=ids, label=ids % 4, callback=told))
    ddpm.partial_diffusion(model, sampler, x_0, ids % 4, strength=0.5, seed=0, sample_ids=ids)
ddpm.generate(model, ddpm.DDIM(num_steps=3, guidance_scale=2.0), seed=0, sample_ids=ids, label=ids % 4, guide=model)
ddpm.repaint(model, ddpm.Ancestral(num_steps=3), x_0, x_0 > 0, ids % 4, jump_length=1, num_resamples=2, seed=0,
             sample_ids=ids)
ddpm.interpolate_images(model, ddpm.DDIM(num_steps=3, eta=0.0), x_0, x_0, torch.rand(5), first_label=ids % 4,
                        second_label=ids % 4, sample_ids=ids)
errors = ddpm.x_0_errors(model, seed=0, sample_ids=ids, x_0=x_0, label=ids % 4)
ddpm.generate(model, ddpm.Ancestral(variance="analytic", num_steps=3), seed=0, sample_ids=ids, label=ids % 4,
              x_0_error=ddpm.x_0_error_table(errors + errors))
denoise = ddpm.NetworkDenoiser(network=lambda x_t, t, label: x_t.repeat(1, 2, 1, 1), schedule=schedule,
                               prediction_type="v", learned_variance=True)
x_t = ddpm.q_sample(schedule, x_0, ids, x_0)
ddpm.p_mean_variance(schedule, denoise, x_t, ids, None, variance="learned_range")
between = continuous_timesteps(schedule, 4, "log_snr")
for sample in (ddpm.DPMSolver2M().sample, ddpm.DPMSolver3M().sample, ddpm.ddim_invert):
    sample(denoise, schedule, x_0, None, timesteps=between)
zero = ddpm.make_schedule(ddpm.ScheduleConfig(shift=2.0, zero_terminal_snr=True))
zero.t_at_log_snr(zero.log_snr(torch.tensor([3.5, 999.0], dtype=torch.float64)))
ddpm.GuidedNetwork(network=network, schedule=schedule, null_label=4, scale=2.0)(x_0, ids, ids % 4)
moments = ddpm.Moments.from_samples(images.flatten(1).float())
ddpm.frechet_distance(moments + moments, moments)
ddpm.FrechetComparison.of(moments, moments + moments).influence(images.flatten(1).float())

t = torch.zeros(5, dtype=torch.int64)
wrong = {
    "t is not int": lambda: ddpm.q_sample(schedule, x_0, t.float(), x_0),
    "t is shorter": lambda: ddpm.q_sample(schedule, x_0, t[:4], x_0),
    "x_0 has no batch": lambda: ddpm.q_sample(schedule, x_0[0], t, x_0[0]),
    "label is float": lambda: denoise(x_t, ids, ids.float()),
    "places have no batch": lambda: schedule.alpha_bar_at(torch.tensor(3.5)),
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
