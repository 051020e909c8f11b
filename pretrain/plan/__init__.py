"""What a configuration will cost, known before anything runs: parameters, FLOPs, bytes. Imports no torch."""

from pretrain.plan.estimate import Plan, StagePlan, model_flops_per_token, plan
from pretrain.plan.gpus import GPUS, GPUFit, device_peak_flops_per_second
from pretrain.plan.report import print_plan

__all__ = [
    "GPUS",
    "GPUFit",
    "Plan",
    "StagePlan",
    "device_peak_flops_per_second",
    "model_flops_per_token",
    "plan",
    "print_plan",
]
