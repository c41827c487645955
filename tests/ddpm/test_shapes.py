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
ddpm.per_sample_loss(network, batch, schedule).mean().backward()
adm = ddpm.UNetConfig(base_channels=8, channel_multipliers=(1, 2), num_res_blocks=1, num_groups=4, num_head_channels=4,
                      attention_resolutions=(4,), adaptive_group_norm=True, residual_resampling=True)
dit = ddpm.DiTConfig(hidden_size=16, depth=2, num_heads=2)
for name in ("unet", "dit"):
    model = ddpm.ModelConfig(model=name, unet=adm, dit=dit, image_size=8, channels=3, num_classes=4)
    other = ddpm.build_model(model, gradient_checkpointing=True)
    ddpm.per_sample_loss(other, batch, schedule).mean().backward()
    other(x_0, ids.double() + 0.5)
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
    batch = ddpm.make_training_batch(schedule, x_0, None, seed=0, sample_ids=ids, epochs=ids, flip=False,
                                     label_drop=0.0, null_label=None, timesteps=chosen)
    sampler_of_t.update(batch.t, batch.weight)
    for variance, factor, objective in [("fixed_large", 1, ddpm.ObjectiveConfig(name="vlb")),
                                        ("learned_range", 2, ddpm.ObjectiveConfig(name="hybrid", weighting="min_snr"))]:
        ddpm.per_sample_loss(lambda x_t, t, label: torch.cat([0 * x_t] * factor, dim=1), batch, schedule,
                             objective=objective, prediction_type="v", variance=variance)
network.eval()
bound = ddpm.bound_of_images(network, schedule, ddpm.LikelihoodConfig(num_steps=4), seed=0, sample_ids=ids, x_0=x_0,
                             label=ids % 4)
stratified = ddpm.LikelihoodConfig(terms="stratified", terms_per_image=2, num_steps=4)
ddpm.bound_of_images(network, schedule, stratified, seed=0, sample_ids=ids, x_0=x_0, label=ids % 4)
few = ddpm.LikelihoodConfig(terms="importance", terms_per_image=2, num_steps=4)
statistics = ddpm.BoundStatistics.of(bound) + ddpm.BoundStatistics.of(bound)
ddpm.bound_of_images(network, schedule, few, seed=0, sample_ids=ids, x_0=x_0, label=ids % 4,
                     probabilities=statistics.importance())
ddpm.probability_flow_bits_per_dim(network, schedule, seed=0, sample_ids=ids, x_0=x_0, label=ids % 4, num_steps=4)
for options in ({}, {"name": "ancestral"}, {"name": "dpm_solver_2m", "guidance_scale": 2.0, "guidance_rescale": 0.5},
                {"name": "dpm_solver_2m_sde", "dynamic_threshold": 0.9, "spacing": "log_snr"},
                {"name": "dpm_solver_3m", "spacing": "trailing"}, {"name": "dpm_solver_3m_common"},
                {"name": "heun", "churn": 5.0, "guidance_scale": 2.0, "guidance_interval": (0.1, 9.0)}):
    sampler = ddpm.SamplerConfig(num_steps=3, **options)
    ddpm.num_evaluations(schedule, sampler)
    images = ddpm.x_0_to_images(
        ddpm.generate(network, schedule, sampler, seed=0, sample_ids=ids, label=ids % 4, image_shape=(3, 8, 8),
                      null_label=4))
errors = ddpm.x_0_errors(network, schedule, seed=0, sample_ids=ids, x_0=x_0, label=ids % 4)
ddpm.generate(network, schedule, ddpm.SamplerConfig(name="ancestral", variance="analytic", num_steps=3), seed=0,
              sample_ids=ids, label=ids % 4, image_shape=(3, 8, 8),
              x_0_error=ddpm.x_0_error_table(errors + errors))
denoise = ddpm.NetworkDenoiser(network=lambda x_t, t, label: x_t.repeat(1, 2, 1, 1), schedule=schedule,
                               prediction_type="v", learned_variance=True)
x_t = ddpm.q_sample(schedule, x_0, ids, x_0)
ddpm.p_mean_variance(schedule, denoise, x_t, ids, None, variance="learned_range")
between = ddpm.continuous_timesteps(schedule, 4, "log_snr")
for sample in (ddpm.dpm_solver_2m_sample, ddpm.dpm_solver_3m_sample, ddpm.ddim_invert):
    sample(denoise, schedule, x_0, None, timesteps=between)
zero = ddpm.make_schedule(ddpm.ScheduleConfig(shift=2.0, zero_terminal_snr=True))
zero.t_at_log_snr(zero.log_snr(torch.tensor([3.5, 999.0], dtype=torch.float64)))
ddpm.GuidedNetwork(network=network, schedule=schedule, null_label=4, scale=2.0)(x_0, ids, ids % 4)
moments = ddpm.Moments.from_samples(images.flatten(1).float())
ddpm.frechet_distance(moments + moments, moments)

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
