"""The precision policy counts layers over the whole decoder, wherever a stage begins."""

import pytest

from model.pattern import parse_pattern
from recipes.compose import load_recipe
from recipes.schema import Recipe
from tests.distributed.harness import run_distributed
from tests.unit.published_precision import FAMILY, published

# Ranks 4; layouts as (pipeline ranks, virtual stages a rank).
LAYOUTS = [(1, 1), (2, 1), (4, 1), (2, 2)]


def cut(pattern: str, stages: int) -> str:
    """The pattern with `|` after stages of different lengths."""
    main, *mtp = pattern.split("/")
    bounds = [0, *(len(main) * i // stages + i for i in range(1, stages)), len(main)]
    parts = [main[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
    return "/".join(["|".join(parts), *mtp])


def recipe(experiment: str, pp: int, virtual: int) -> Recipe:
    uncut = load_recipe([f"experiment={experiment}"]).model.hybrid_layer_pattern
    pattern = cut(uncut, pp * virtual) if pp > 1 else uncut
    return load_recipe(
        [
            f"experiment={experiment}",
            "precision=nvfp4",
            "parallel=single",
            f"parallel.pipeline_model_parallel_size={pp}",
            f"model.hybrid_layer_pattern='{pattern}'",
            "model.num_moe_experts=4",
            "model.moe_router_topk=2",
        ]
    )


def local_formats(
    rank: int, world_size: int, experiment: str
) -> dict[tuple[int, int], list[dict[str, str]]]:
    """Layout -> for each chunk of this rank: Megatron's stage-local name -> format."""
    from megatron.core import parallel_state

    from model.hybrid import build_model, transformer_config
    from parallel.device import meta_device
    from parallel.groups import initialize_groups

    plain = load_recipe(["precision=bf16"]).precision
    found = {}
    for pp, virtual in LAYOUTS:
        of = recipe(experiment, pp, virtual)
        initialize_groups(of.parallel, seed=1, virtual_stages=virtual)
        config = transformer_config(of.model, plain, of.parallel)
        config.init_model_with_meta_device = True
        config.perform_initialization = False
        chunks = []
        for stage in range(virtual):
            vp_stage = stage if virtual > 1 else None
            with meta_device():
                model = build_model(
                    of,
                    config,
                    pre_process=parallel_state.is_pipeline_first_stage(False, vp_stage),
                    post_process=parallel_state.is_pipeline_last_stage(False, vp_stage),
                    vp_stage=vp_stage,
                )
            recipes = {
                name: module.te_quant_params.training_recipe
                for name, module in model.named_modules()
                if hasattr(module, "te_quant_params")
            }
            chunks.append(
                {
                    name: r.fp4_quantization_recipe or r.fp8_quantization_recipe or "bf16"
                    for name, r in recipes.items()
                }
            )
        found[pp, virtual] = chunks
        parallel_state.destroy_model_parallel()
    return found


def joined(chunks: list[dict[str, str]], lengths: list[int]) -> dict[str, str]:
    """The stages' formats under global names: stage s starts where those before it end."""
    whole: dict[str, str] = {}
    for s, chunk in enumerate(chunks):
        for name, found in chunk.items():
            head, _, rest = name.partition("decoder.layers.")
            if not head and rest:
                index, _, module = rest.partition(".")
                name = f"decoder.layers.{sum(lengths[:s]) + int(index)}.{module}"
            assert name not in whole
            whole[name] = found
    return whole


@pytest.mark.slow
@pytest.mark.parametrize("experiment", FAMILY)
def test_formats_do_not_depend_on_the_stages(experiment: str) -> None:
    ranks = run_distributed(local_formats, 4, experiment)
    for pp, virtual in LAYOUTS:
        pattern = recipe(experiment, pp, virtual).model.hybrid_layer_pattern
        lengths = [len(part) for part in parse_pattern(pattern).stages]
        # Megatron puts the pipeline outermost: ranks of one stage are data-parallel copies.
        # Chunk v of pipeline rank p is stage v * pp + p.
        stages = [ranks[p * 4 // pp][pp, virtual][v] for v in range(virtual) for p in range(pp)]
        assert joined(stages, lengths) == published(experiment)
