"""What is refused, by name and before a model is loaded: features of vLLM that a compressed cache
would make wrong, or that were not made to work with one.
"""

from __future__ import annotations

from collections.abc import Iterator

from kvhive.recipe import Recipe
from vllm.config import VllmConfig

from kvhive_vllm.recipes import KEY, SCHEDULER, WORKER, configured

EXACT = ("auto", "float16", "bfloat16", "float32")  # dtypes of pages that hold keys as they are


def recipe_of(config: VllmConfig) -> Recipe | None:
    """The recipe that an engine was given; None: it was given none.

    Raises as `recipes.configured`.
    """
    return configured(config.additional_config)


def checked_recipe(config: VllmConfig) -> Recipe:
    """The recipe of an engine that is to run one.

    Raises `ValueError` where there is none, where it cannot be run, or where the engine is set up
    in a way that it cannot be run with.
    """
    recipe = recipe_of(config)
    if recipe is None:
        raise ValueError(
            f"kvhive-vllm was given no recipe: add additional_config={{'{KEY}': "
            "{'recipe': 'h2o@1024'}}, or leave its scheduler and worker out"
        )
    why = next(refusals(config, recipe), None)
    if why is not None:
        raise ValueError(f"kvhive-vllm cannot run {recipe} here: {why}")
    return recipe


def refusals(config: VllmConfig, recipe: Recipe) -> Iterator[str]:
    """Why a recipe cannot be run with this configuration, one sentence for each reason."""
    yield from _half_set_up(config)
    yield from _parallel(config, recipe)
    yield from _model(config)
    cache = config.cache_config
    if config.speculative_config is not None:
        yield "speculative decoding takes back tokens that were counted; leave it out"
    if config.kv_transfer_config is not None:
        yield "a KV connector finds blocks by the position of their tokens; leave it out"
    if config.ec_transfer_config is not None:
        yield "an encoder-cache connector has not been tried; leave it out"
    if cache.cache_dtype not in EXACT:
        yield (
            f"pages in {cache.cache_dtype} cannot be moved without rounding them again; use "
            "--kv-cache-dtype auto"
        )
    if cache.kv_sharing_fast_prefill:
        yield "--kv-sharing-fast-prefill leaves queries out that vote; leave it out"


def _half_set_up(config: VllmConfig) -> Iterator[str]:
    if config.scheduler_config.scheduler_cls != SCHEDULER:
        yield f"its scheduler is missing; add --scheduler-cls {SCHEDULER}"
    if config.parallel_config.worker_cls != WORKER:
        yield f"its worker is missing; add --worker-cls {WORKER}"


def _parallel(config: VllmConfig, recipe: Recipe) -> Iterator[str]:
    parallel, policy = config.parallel_config, recipe.policy
    if parallel.tensor_parallel_size > 1 and policy.granularity != "head":
        yield (
            f"the heads of a layer choose together in {policy.name}, and tensor parallelism deals "
            "them out; use one GPU a replica, or a policy by head such as snapkv"
        )
    if parallel.pipeline_parallel_size > 1:
        yield "pipeline parallelism has not been tried; use tensor parallelism"
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        yield "context parallelism deals a request's tokens out by position; leave it out"
    if parallel.use_ubatching:
        yield "micro-batching (--enable-dbo) runs two halves of a step at once; leave it out"


def _model(config: VllmConfig) -> Iterator[str]:
    model = config.model_config
    if model.runner_type != "generate":
        yield f"a model that runs as {model.runner_type!r} keeps no cache to generate from"
    if model.is_encoder_decoder:
        yield "encoder-decoder models attend to what they do not generate"
    if model.use_mla:
        yield "latent attention (MLA) has no keys by head"
    if model.is_multimodal_model:
        yield "models that see or hear have not been tried"
    if model.is_hybrid:
        yield "a model with recurrent layers has caches of another kind beside"
