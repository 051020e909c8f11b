"""Parallel training: process groups, the pipeline schedule, ZeRO, and Megatron-core without CUDA."""
