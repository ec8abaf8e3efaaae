"""What is measured besides the loss, from its fields of the config: probes, zero-shot, transfer."""

from pathlib import Path

import numpy as np
from flax import linen as nn
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from lsdl import evaluators
from lsdl import step as steps
from lsdl.checks import choice
from lsdl.data import dataset
from lsdl.data.dataset import SPLITS, Dataset
from lsdl.errors import UserError
from lsdl.sharding import partition


def make_transfer(config: ConfigDict, data: Dataset) -> Dataset | None:
    """The other data set that the model is judged on: images or features as those of `data`."""
    transfer, source = config.eval, config.eval.transfer_source
    if not source:
        return None
    test = transfer.transfer_test_split
    found = dataset.make(
        source,
        splits={"train": transfer.transfer_train_split, "valid": test, "test": test},
        declared=dict.fromkeys(SPLITS),
        mixture=(),
        transforms=transfer.transfer_transforms,
        eval_transforms=transfer.transfer_transforms,
        label_noise=0.0,
        tokenizer="",
        seq_len=0,
        segments=False,
        in_memory_mib=0,
        seed=config.seed,
    )
    for leaf in ("image", "features"):
        ours, theirs = (d.features.get(leaf) for d in (data, found))
        if ours != theirs or "label" not in found.features:
            raise UserError(
                f"eval.transfer_source={source!r} must have a label and what the model takes, "
                f"{leaf} {ours and ours.shape}: it has "
                f"{', '.join(f'{n} {x.shape}' for n, x in found.features.items())}; "
                "eval.transfer_transforms may change that."
            )
    return found


def make_evaluators(
    config: ConfigDict,
    data: Dataset,
    task,
    module: nn.Module,
    *,
    placed: dict,
    transfer: Dataset | None,
    transfer_loaders: evaluators.Loaders,
) -> tuple:
    """What is measured besides the loss: zero-shot accuracy for CLIP, and the probes asked for."""
    program = lambda function: partition.program(  # noqa: E731
        function, out_shardings=NamedSharding(placed["mesh"], P()), **placed
    )
    encode = _encoder(config, task, module)
    found = []
    contrastive = config.task == "contrastive"
    if contrastive and data.class_names:
        found.append(_zero_shot(data, data.class_names, data.prompt, module, encode, program))
    if contrastive and transfer:
        names = _class_names(config, transfer)
        other = _zero_shot(data, names, transfer.prompt, module, encode, program)
        found.append(evaluators.Transfer(other, transfer_loaders))
    for name in config.eval.probes:
        choice("eval.probes", name, evaluators.PROBES)
        judged = transfer or data
        if encode is None or "label" not in judged.features:
            raise UserError(
                f"eval.probes={name!r} needs a classification or a contrastive task, and labels: "
                f"task={config.task} on {config.data.source} has not both."
            )
        step = program(evaluators.make_feature_step(encode, steps.evaluated))
        probe = evaluators.Probe(name, step, judged.num_classes, config.eval.probe_shots)
        found.append(evaluators.Transfer(probe, transfer_loaders) if transfer else probe)
    if transfer and not any(isinstance(e, evaluators.Transfer) for e in found):
        raise UserError(
            f"eval.transfer_source={config.eval.transfer_source!r} measures nothing: give "
            "eval.probes=('knn', 'linear')."
        )
    return tuple(found)


def _encoder(config: ConfigDict, task, module: nn.Module):
    """`(variables, batch) -> (B, D)`, the model's features; None if it is not of that kind."""
    if config.task == "contrastive":
        return lambda variables, batch: module.apply(
            variables, task.image(batch), train=False, method="encode_image"
        )
    if config.task != "classification":
        return None
    headless = module.clone(num_classes=0, parent=None)
    return lambda variables, batch: headless.apply(variables, *task.inputs(batch), train=False)


def _zero_shot(data: Dataset, names, prompt: str, module: nn.Module, encode, program):
    tokens = np.stack([data.caption(prompt.format(name))[None] for name in names])
    classes = evaluators.make_class_features(module.apply, steps.evaluated, tokens)
    step = evaluators.make_zero_shot_step(encode, steps.evaluated)
    return evaluators.ZeroShot(program(classes), program(step))


def _class_names(config: ConfigDict, transfer: Dataset) -> tuple[str, ...]:
    file, source = config.eval.transfer_class_names, config.eval.transfer_source
    if file and not Path(file).is_file():
        raise UserError(f"eval.transfer_class_names={file!r} is no file.")
    names = tuple(Path(file).read_text().splitlines()) if file else transfer.class_names
    if len(names) != transfer.num_classes:
        raise UserError(
            f"eval.transfer_source={source!r} has {transfer.num_classes} classes and "
            f"{len(names)} names for them: eval.transfer_class_names is a text file with a line "
            "for each class."
        )
    return names
