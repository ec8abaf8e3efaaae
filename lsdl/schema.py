"""The fields of every config: what the template holds is all that there is, and all defaults."""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

UNITS = {"steps": int, "epochs": float, "examples": int, "tokens": int, "percent": float}
DURATIONS = ("total", "optim.schedule.warmup", "eval.every", "checkpoint.every", "log.every")
# At most one spelling, where the others have one.
OPTIONAL_DURATIONS = (
    *("optim.schedule.period", "optim.schedule.plateau_patience", "optim.switch.at"),
)


def template() -> ConfigDict:
    """The schema of every experiment, with the values that most of them share."""
    config = ConfigDict()
    config.name = ""  # of the run, and of its default folder runs/NAME
    config.seed = 0  # of the initial values, the order of the examples, dropout and transforms
    # classification | regression | language | masked_language | contrastive
    config.task = "classification"

    config.batch_size = 128  # global batch: examples per optimizer update
    config.accum = 1  # microbatches per update
    # (percent, factor) in order: from there on, in percent of the run's examples, a step takes
    # factor x batch_size examples in factor x accum microbatches
    config.batch_ramp = ()
    config.precision = "float32"  # of the computation: float32 | bfloat16; parameters are float32
    _durations(config, "total")

    config.mesh = "data=-1"  # ordered axes, one -1 takes the devices that are left
    config.dcn_mesh = ""  # as data=2: the part of mesh's sizes that crosses slices or nodes
    # dp | zero1 | fsdp | tp | tp_sp | fsdp_tp | one_weird_trick | pp, or pairs (logical axis, mesh
    # axis or axes) of one's own, the first that fits wins
    config.rules = placeholder(object)
    config.rules = "fsdp_tp"
    # (regex, mesh axis or axes of each dim) of single parameters: these win over the rules
    config.param_rules = ()
    config.partitioner = "jit"  # jit: the compiler places collectives | shard_map | pmap: by hand
    config.sequence_attention = "ring"  # of a length that the mesh splits: ring | gather
    config.pipeline_microbatches = 0  # that travel through the stages; 0: as many as stages
    # none | full | dots | dots_no_batch | names:a,b | offload:a,b | every:k | sqrt | binomial |
    # poor (lsdl/models/remat.py), or auto: the cheapest of them that fits
    config.remat = "none"

    config.model = ConfigDict()
    config.model.name = ""  # of lsdl.components.MODELS; the other fields are the model's own

    config.data = _data()

    config.loss = _loss()
    config.init_from = ""  # a run folder or converted weights to start from
    config.init_fresh = ""  # regex of what is not taken from there, as "head/.*"
    config.teacher = ""  # a run folder whose model is distilled

    config.optim = _optim()
    config.guard = _guard()
    for group in ("eval", "checkpoint", "log"):
        config[group] = ConfigDict()
        _durations(config[group], "every")
    _evaluation(config.eval)
    config.checkpoint.keep_latest = 2  # 1 keeps two as well: the last one alone might not be read
    config.checkpoint.keep_best = 1  # by the lowest valid loss
    config.log.tensorboard = True  # whether event files are written as well
    # of each step: "norms" of its layers; of its microbatches the gradient's "noise" and "angle"
    config.log.measure = ()
    # seconds without the end of a step, or 20 of the run's steps if that is longer, after which all
    # processes show their stacks and end (71); saving, evaluating: 60 times as long. 0: never.
    config.stuck_after_s = 60.0
    return config


def _loss() -> ConfigDict:
    loss = ConfigDict()
    loss.label_smoothing = 0.0  # classification: share of the uniform distribution in the labels
    loss.mixup = 0.0  # classification: alpha of Beta(alpha, alpha); 0 turns it off
    loss.distill_weight = 0.0  # classification: share of the teacher in the loss
    loss.distill_temperature = 0.0  # 0: the teacher's most probable class
    loss.z_loss = 0.0  # language: times the square of the logits' log-sum-exp
    loss.balance = 0.0  # language, of a mixture of experts: times each layer's balance loss
    loss.form = "softmax"  # contrastive: softmax | sigmoid
    loss.chunk = 0  # positions, or rows, with logits in memory at one time; 0: all
    return loss


def _guard() -> ConfigDict:
    guard = ConfigDict()
    # a step whose loss, gradient or model state is not finite changes nothing; more in a row than
    # this end the run
    guard.limit = 5
    # a step whose loss or gradient norm lies above mean + sigmas x std of those of the window's
    # accepted steps (of their logarithms): off | skip, it changes nothing either | rewind, to the
    # newest checkpoint rewind_steps before it, and on without the batches from there to the spike
    guard.spike = "off"
    guard.window = 128  # accepted steps; half of them are there before the first spike is
    guard.sigmas = 6.0  # standard deviations above the mean that make a spike
    guard.rewind_steps = 100  # before the spike, at least
    # each so many steps a row in audit.jsonl, which lsdl.audit compares with a replay; 0: none
    guard.audit_every_steps = 0
    return guard


def _evaluation(group: ConfigDict) -> None:
    group.probes = ()  # "knn", "linear": on frozen features, after training
    group.probe_shots = 0  # training examples of each class that they see; 0: all
    # another labelled data set that probes, and zero-shot classification, are measured on.
    group.transfer_source = ""
    group.transfer_train_split = "train"  # that probes learn from
    group.transfer_test_split = "test"  # that they are judged by
    group.transfer_transforms = ()  # of all its examples
    group.transfer_class_names = ""  # a file with a line for each class; "": as it says


def _data() -> ConfigDict:
    data = ConfigDict()
    data.source = ""  # digits | wine | stdlib_text | modular:97:add | ... | tfds:NAME
    data.mixture = ()  # (source, weight) of the training examples; (): data.source alone
    data.train_split = "train"  # trained on; or slices of splits, in TFDS's words: "train[:90%]"
    data.valid_split = "valid"  # judged during the run
    data.test_split = "test"  # read once, at the end
    data.train_examples = placeholder(int)  # how many: for a set without a card, and for text
    data.valid_examples = placeholder(int)  # likewise
    data.test_examples = placeholder(int)  # likewise
    data.sampling = "epoch"  # epoch: a permutation each epoch | replace: independent draws
    # (first, end) of batches that training leaves out, counted from 0 in the order of the seed
    data.skip_batches = ()
    data.transforms = ()  # of training examples, in this order: "shift:1", "flip", ...
    data.eval_transforms = ()  # of every other example, as "center_crop:224"
    data.label_noise = 0.0  # share of the training labels that are drawn at random
    # of text: bytes, or a tokenizer.json, or a SentencePiece .model; "": given later
    data.tokenizer = "bytes"
    data.seq_len = 0  # tokens of a window of text, or of a caption; 0 without text
    data.segments = False  # windows say which of their documents a token belongs to
    data.in_memory_mib = 256  # a split up to this size is decoded once and kept
    data.prefetch = 2  # batches made and sent to the devices ahead of the step
    return data


def _optim() -> ConfigDict:
    optim = ConfigDict()
    # sgd | adam | adamw | lars | lamb | adagrad | adafactor | lion | muon | sign_sgd |
    # schedule_free | lbfgs, and on one device newton | newton_cg | ggn_cg | coordinate_descent
    optim.name = "adamw"
    optim.momentum = 0.9  # decay of the averaged gradients: sgd, lars, muon
    # sgd: accumulator holds gradients | velocity has the rate inside | corrected for its changes
    optim.momentum_form = "accumulator"
    optim.nesterov = False  # look ahead by the momentum: sgd, lars, muon
    optim.b1 = 0.9  # of the first moments: adam, adamw, lamb, lion, muon's adam, schedule_free
    optim.b2 = 0.999  # of the second moments: as b1
    optim.eps = 1e-8  # outside the root: adam, adamw, lamb, muon, schedule_free; inside: adagrad
    optim.eps_root = 0.0  # inside the root: adam, adamw, lamb
    # adam, adamw: elementwise | norm, one number from the norm of the whole gradient
    optim.second_moment = "elementwise"
    optim.trust_coefficient = 0.001  # lars: length of an update / of its weights, at rate 1
    # lars: paper | lecture: an update is the rate times as long as its weights
    optim.lars_form = "paper"
    optim.initial_accumulator = 0.1  # adagrad: of the sums of squares
    optim.factored_dim = 128  # adafactor: two dims from this size on have factored moments
    optim.parameter_scale = True  # adafactor: the rate is relative to the parameter's size
    # (regex, value): which matrices muon moves; the rest is adam's
    optim.muon_mask = ((r"(.*/)?head/.*", False), (r".*/kernel", True), (r".*", False))
    # muon: root mean square of an update's elements, as adam's; 0: sqrt(max(1, out / in))
    optim.muon_rms = 0.2
    optim.schedule_free_base = "adamw"  # schedule_free: sgd | adamw
    optim.lbfgs_memory = 10  # lbfgs: steps that it remembers
    optim.linesearch_steps = 20  # lbfgs: trial steps, at most; 0: the schedule's rate
    optim.damping = 0.0  # newton, newton_cg, ggn_cg, coordinate_descent: added to the diagonal
    optim.newton_limit = 4096  # newton: the most parameters it takes
    optim.cg_steps = 50  # newton_cg, ggn_cg: of conjugate gradients, at most
    optim.weight_decay = 0.0  # of what decay_mask chooses; sgd, lars: added to the gradient
    optim.clip_norm = 0.0  # what clip_form compares with; 0 turns clipping off
    # global_norm | block_rms, of each array | adaptive, relative to each output's weights
    optim.clip_form = "global_norm"
    # what decays: (regex, value) in order, the first match wins, every parameter must match one
    optim.decay_mask = ((r".*/(bias|scale)", False), (r".*", True))
    optim.trust_mask = (
        (r".*/(bias|scale)", False),
        (r".*", True),
    )  # lars, lamb: what has its ratio
    optim.rate_rules = ()  # (regex, factor of the rate), the first match wins; 0 freezes
    optim.sam_rho = 0.0  # radius of sharpness-aware minimisation; 0 turns it off
    optim.ema_decay = 0.0  # of the averaged parameters that are evaluated; 0 turns them off
    optim.switch = ConfigDict()
    optim.switch.name = ""  # the optimiser from switch.at_* on, or from the first plateau
    optim.switch.rate_factor = 1.0  # of the second optimiser's rate
    _durations(optim.switch, "at")
    optim.schedule = _schedule()
    return optim


def _schedule() -> ConfigDict:
    schedule = ConfigDict()
    # constant | cosine = warmup_cosine | step | exponential | polynomial | inverse_time | rsqrt |
    # wsd | triangular | triangular2 | exp_range | sgdr | one_cycle | exp_growth | plateau
    schedule.name = "warmup_cosine"
    schedule.peak = 1e-3  # the highest rate, of a batch of base_batch if that is given
    schedule.scaling = "none"  # of the peak with batch_size / base_batch: none | linear | sqrt
    schedule.base_batch = 0  # the batch that peak is of: given with a scaling, and only then
    schedule.start_factor = 0.0  # first rate of the warm-up / peak before scaling
    schedule.warmup_form = "linear"  # linear | constant: the peak before scaling, all the way
    # last rate / peak (cosine, exponential, polynomial, wsd, one_cycle; sgdr: of each cycle)
    schedule.end_factor = 0.0
    schedule.low_factor = 0.1  # lowest rate / peak (triangular*, exp_range; one_cycle: first rate)
    schedule.power = 2.0  # of the fall (polynomial)
    schedule.boundaries_percent = (50.0, 75.0)  # of the run: where the rate falls (step)
    schedule.boundaries_steps = ()  # in their place
    schedule.boundaries_epochs = ()  # likewise
    schedule.step_factor = 0.1  # times this at each boundary (step)
    # each step's factor: of the rate (exponential; 0: as end_factor says), the height (exp_range)
    schedule.decay_factor = 0.0
    schedule.growth_decay = 0.0  # the weight decay that exp_growth stands for; needs sgd
    schedule.cycle_factor = 2.0  # a cycle's length / the one's before (sgdr)
    schedule.rise_percent = 30.0  # that rise, of the steps after the warm-up (one_cycle)
    # plateau: times factor if the mean loss of an epoch has not been below the best by more than
    # threshold for patience (the optimiser's switch waits for the same)
    schedule.plateau_factor = 0.1
    schedule.plateau_threshold = 1e-3  # nats
    _durations(schedule, "plateau_patience")
    _durations(schedule, "warmup")
    # half a cycle (triangular*, exp_range), the first cycle (sgdr), the decay (wsd), the time to
    # half the rate (inverse_time), to 1/sqrt(2) of it (rsqrt)
    _durations(schedule, "period")
    return schedule


def _durations(group: ConfigDict, name: str) -> None:
    for unit, kind in UNITS.items():
        if (name, unit) != ("total", "percent"):
            group[f"{name}_{unit}"] = placeholder(kind)
