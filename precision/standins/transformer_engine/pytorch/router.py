"""Fused router kernels: absent, so Megatron keeps its unfused router (moe_router_fusion off)."""

fused_compute_score_for_moe_aux_loss = None
fused_moe_aux_loss = None
fused_topk_with_score_function = None
