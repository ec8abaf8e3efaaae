"""Compilers for what is not here: where they lie, what they say, and what is made of it."""

import itertools
import json
import os
import sys
from types import SimpleNamespace

import jax
import pytest

from lsdl import experiment
from lsdl.errors import NO_COMPILER, NoCompilerError, UserError
from lsdl.planner import compiled, hardware, hlo, largest, oom, toolchain, topology
from lsdl.sharding import mesh as meshes
from tests.conftest import CONFIGS
from tests.test_collectives import computation, program, reduce

MLP = f"{CONFIGS / 'digits_mlp.py'}:smoke"


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """`tools({package: version})`: a folder of compilers that has these, empty files."""

    def tools(versions):
        monkeypatch.setenv("LSDL_PLAN_TOOLS", str(tmp_path / "tools"))
        for name, version in versions.items():
            put(toolchain.folder(), name, version)
        return toolchain.folder()

    return tools


def put(place, name, version):
    file = place / toolchain.FILES[name]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    info = place / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


# Where they lie


def test_the_folder_is_of_this_jax_and_may_be_moved(monkeypatch, tmp_path):
    name = f"jax-{jax.__version__}"
    monkeypatch.delenv("LSDL_PLAN_TOOLS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert toolchain.folder() == tmp_path / "lsdl" / "plan-tools" / name
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert toolchain.folder().parts[-4:] == (".cache", "lsdl", "plan-tools", name)
    monkeypatch.setenv("LSDL_PLAN_TOOLS", str(tmp_path / "else"))
    assert toolchain.folder() == tmp_path / "else" / name


@pytest.mark.parametrize("target", ["tpu:v5e:2x2", "gpu:h100:1x8"])
def test_without_a_compiler_the_sentence_says_how_to_get_it(tools, target):
    tools({})
    with pytest.raises(NoCompilerError, match=r"no (libtpu|jax-cuda12-pjrt).*make plan-tools") as e:
        compiled.ask(MLP, [], target)
    assert e.value.exit_code == NO_COMPILER == 3
    assert toolchain.missing("cpu") == ""


def test_a_plugin_of_another_version_is_never_loaded(tools):
    tools({"jax-cuda12-pjrt": "0.4.1", "nvidia-cuda-nvcc-cu12": "12.9.86"})
    with pytest.raises(NoCompilerError, match=rf"0\.4\.1, which must be .*{jax.lib.__version__}"):
        compiled.ask(MLP, [], "gpu:v100:1x1")


def test_the_versions_are_those_that_this_jax_asks_for():
    wanted = toolchain.wanted()
    assert wanted["libtpu"].startswith(toolchain._asked_for().removesuffix("*"))
    assert wanted["libtpu"].count(".") == 3  # one version and no other
    assert wanted["jax-cuda12-pjrt"] == f"=={jax.lib.__version__}"


def test_an_install_is_whole_or_absent(tools, monkeypatch, capfd):
    place = tools({"jax-cuda12-pjrt": "0.4.1"})  # what was there was of another jaxlib
    runs = []

    def pip(command, *, fails):
        runs.append(command)
        target = type(place)(command[command.index("--target") + 1])
        for name, version in toolchain.wanted().items():
            put(target, name, version.removeprefix("=="))
            if fails:
                return SimpleNamespace(returncode=1)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(toolchain.subprocess, "run", lambda c: pip(c, fails=True))
    assert toolchain.main() == 2
    assert toolchain.installed(place) == {"jax-cuda12-pjrt": "0.4.1"}
    monkeypatch.setattr(toolchain.subprocess, "run", lambda c: pip(c, fails=False))
    assert toolchain.main() == 0
    assert "--no-deps" in runs[-1]
    assert [toolchain.missing(kind) for kind in toolchain.NEEDED] == ["", "", ""]
    assert toolchain.installed(place).keys() == toolchain.FILES.keys()
    assert [path.name for path in place.parent.iterdir()] == [place.name]
    assert toolchain.main() == 0
    assert len(runs) == 2
    assert capfd.readouterr().out.endswith("is complete.\n")


def test_the_process_sees_cpus_alone_and_keeps_what_it_was_given(tools, tmp_path):
    place = tools({})
    given = {"XLA_FLAGS": "--xla_a=1", "JAX_PLATFORMS": "cuda", "HOME": "/x"}
    made = lambda kind: toolchain.environment(kind, devices=7, given=given, dump=tmp_path)  # noqa: E731
    for kind in toolchain.NEEDED:
        assert made(kind)["JAX_PLATFORMS"] == "cpu"
        assert made(kind)["HOME"] == "/x"
        assert made(kind)["XLA_FLAGS"].split()[0] == "--xla_a=1"
    assert made("cpu")["JAX_NUM_CPU_DEVICES"] == "7"
    assert made("tpu")["TPU_LIBRARY_PATH"] == str(place / "libtpu/libtpu.so")
    name, _, plugin = made("gpu")["PJRT_NAMES_AND_LIBRARY_PATHS"].partition(":")
    assert (name, plugin) == ("cuda", str(place / toolchain.FILES["jax-cuda12-pjrt"]))
    assert f"--xla_gpu_cuda_data_dir={place}/nvidia/cuda_nvcc" in made("gpu")["XLA_FLAGS"].split()


# What they are told


def test_a_gpu_is_described_field_by_field():
    text = topology.gpu_config(hardware.parse("gpu:a100-80:1x8"))
    fields = dict(line.strip().split(": ", 1) for line in text.splitlines() if ": " in line)
    assert fields["core_count"] == "108"
    assert fields["device_memory_size"] == "85100068864"
    assert fields["block_dim_limit_x"] == "2147483647"  # without it the compiler divides by 0
    assert "major: 8 minor: 0" in text
    assert "feature_extension: NONE" in text
    assert "ACCELERATED" in topology.gpu_config(hardware.parse("gpu:h100:1x8"))
    assert text.count("{") == text.count("}")


def test_a_mesh_may_take_a_part_of_a_torus_dim():
    class Chip(SimpleNamespace):
        __hash__ = object.__hash__

    same = dict(platform="tpu", device_kind="TPU v5", core_on_chip=0, process_index=0)
    where = itertools.product(range(8), range(8), range(8))
    chips = [Chip(id=i, coords=(x, y, z), **same) for i, (z, y, x) in enumerate(where)]
    mesh = meshes.make_mesh({"data": 4, "fsdp": 32, "tensor": 4}, chips)
    assert mesh.shape == {"data": 4, "fsdp": 32, "tensor": 4}
    for row in mesh.devices.reshape(-1, 4):  # neighbours all of them
        assert sum(len({chip.coords[dim] for chip in row}) > 1 for dim in range(3)) == 1
        (dim,) = (d for d in range(3) if len({chip.coords[d] for chip in row}) > 1)
        assert max(c.coords[dim] for c in row) - min(c.coords[dim] for c in row) == 3


# What a TPU's and a GPU's programs are written in


def asynchronous(text):
    return {one.kind: one.asynchronous for one in hlo.collectives(text, {"data": 8})}


def test_what_leaves_the_device_free_is_told_apart():
    alone = '"collective_backend_config":{"is_sync":true}'
    start = reduce("(f32[1]{0}, f32[8]{0})", kind="all-gather-start")
    wrapped = "%w (q: f32[4]) -> f32[4] {\n  ROOT " + reduce("f32[8]{0}") + "\n}\n"
    assert asynchronous(program(start)) == {"all-gather": True}
    assert asynchronous(program(f"{start}, backend_config={{{alone}}}")) == {"all-gather": False}
    assert asynchronous(program(reduce("f32[8]{0}"))) == {"all-reduce": False}
    text = program("%s = ((f32[4]), f32[8]) async-start(%p), calls=%w", others=wrapped)
    assert asynchronous(text) == {"all-reduce": True}


def test_a_tpu_scatters_within_a_fusion():
    inner = computation("all-reduce-scatter.1.clone", reduce("f32[64,4]{1,0}"), "%d = f32[] x()")
    line = "%f = f32[8,4]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1.clone"
    (one,) = hlo.collectives(program(line, others=inner), {"data": 8})
    assert (one.kind, one.group, one.nbytes()) == ("reduce-scatter", 8, 8 * 4 * 4)
    assert one.wire_bytes() == 7 * 8 * 4 * 4


@pytest.mark.parametrize(("limit", "times"), [("%n", 96), ("%other", None)])
def test_a_tpu_says_in_the_condition_how_often_a_loop_runs(limit, times):
    condition = computation(
        "below",
        "%n = s32[]{:T(128)} constant(96)",
        f"ROOT %lt = pred[]{{:T(512)}} compare(%i, {limit}), direction=LT, metadata={{}}",
    )
    body = computation("body", reduce("f32[2]{0}"))
    line = "%while.1 = (s32[], f32[4]) while(%t), condition=%below, body=%body"
    text = program(line, others=condition + body)
    if times is None:
        with pytest.raises(UserError, match="how often"):
            hlo.collectives(text, {"data": 8})
    else:
        (one,) = hlo.collectives(text, {"data": 8})
        assert one.times == times


@pytest.mark.parametrize(
    ("limit", "added", "times"), [(8, 2, 4), (7, 2, 4), (8, 1, 8), (8, None, 8), (1, 2, 1)]
)
def test_a_tpu_counts_in_steps_that_the_body_tells(limit, added, times):
    """In steps of 2 where it takes a product and the exchange of its parts together."""
    condition = computation(
        "below",
        f"%n = u32[]{{:T(128)}} constant({limit})",
        "%i = u32[]{:T(128)} get-tuple-element(%p), index=1",
        "ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT, metadata={}",
    )
    more = "%other = u32[] add(%c, %c)" if added is None else "%next = u32[] add(%at, %step)"
    body = computation(
        "body",
        reduce("f32[2]{0}"),
        f"%step = u32[]{{:T(128)}} constant({added or 5})",
        "%at = u32[]{:T(128)} get-tuple-element(%p), index=1",
        more + ", control-predecessors={%at}",
        "ROOT %t = (f32[2]{0}, u32[]{:T(128)}) tuple(%r, /*index=1*/%next)",
    )
    line = "%while.1 = (f32[2], u32[]) while(%t), condition=%below, body=%body"
    (one,) = hlo.collectives(program(line, others=condition + body), {"data": 8})
    assert one.times == times


# What does not fit


def test_refusals_are_read():
    """Real messages: libtpu 0.0.42.1 on v5e:2x2 and v5p:8x8x16."""
    start = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
    message = start + "temporaries (23.53G) exceeds available HBM (15.75G)."
    assert oom.parse(message) == oom.Refusal(round(23.53 * 2**30), round(15.75 * 2**30), True)
    message = start + "temporaries (204.19G) exceeds available HBM (95.74G)."
    assert oom.parse(message).limit_bytes == round(95.74 * 2**30)
    assert oom.parse("INTERNAL: RET_CHECK failure") is None
    assert oom.parse("RESOURCE_EXHAUSTED: something else") is None


def test_bytes_of_a_refusal_add_up():
    found = oom.numbers(oom.Refusal(700, 900, True), 300, 50)
    assert found["needed_bytes"] == 350 + 700
    assert (found["argument_bytes"], found["temporary_bytes"]) == (350, 700)
    found = oom.numbers(oom.Refusal(1000, 900, False), 300, 50)
    assert (found["needed_bytes"], found["temporary_bytes"]) == (1000, 650)
    assert found["output_bytes"] == found["aliased_bytes"] == 300
    assert found["fits"] is False


def test_the_largest_are_what_lies_in_memory():
    fused = computation("fused", '%a = f32[99,99]{1,0} add(%p, %p), metadata={op_name="no"}')
    text = program(
        "%p.1 = f32[77,77]{1,0} parameter(0)",
        '%f = bf16[30,40]{1,0:T(8)} fusion(%p), kind=kLoop, calls=%fused, metadata={op_name="f"}',
        "%v = f32[88,88]{1,0:T(8,128)S(1)} fusion(%p), kind=kLoop, calls=%fused",
        "%t = (f32[90,90]{1,0}, s32[]) while(%p), condition=%add, body=%fused",
        "%first = f32[20,50]{1,0} copy(%p)",
        '%g = f32[20,50]{1,0} custom-call(%p), metadata={op_name="g"}',
        others=fused,
    )
    rows = largest.top(largest.temporaries(text))
    assert [
        (row["name"], row["shape"], row["dtype"], row["bytes"], row["what"]) for row in rows
    ] == [
        ("g", [20, 50], "f32", 4000, "g"),
        ("f", [30, 40], "bf16", 2400, "f"),
    ]


# Who asks


def test_a_step_compiled_for_these_cpus_is_reported(load):
    target = hardware.parse("cpu:8")
    config = load("digits_mlp:smoke", "mesh=data=2,fsdp=4")
    built = experiment.build(config, devices=topology.devices(target))
    answer = json.loads(json.dumps(compiled.compiled(built, target)))
    found, bill = answer["compiled"], answer["collectives"]
    arguments = largest.arguments(built.abstract_state, built.abstract_batch)
    assert found["argument_bytes"] == sum(row["bytes"] for row in arguments)
    assert (
        found["needed_bytes"]
        == (found["argument_bytes"] + found["temporary_bytes"] + found["output_bytes"])
        - found["aliased_bytes"]
    )
    assert (found["target"], found["device_count"]) == ("cpu:8", 8)
    assert (found["limit_bytes"], found["fits"]) == (None, None)
    sizes = [row["bytes"] for row in found["largest"]]
    assert sizes == sorted(sizes, reverse=True)
    assert len(sizes) == 5
    assert {row["axis"] for row in bill} >= {"data", "fsdp"}


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """`worker(code)`: the process that answers runs this instead, `request` and `say` given."""

    def worker(code):
        head = f"#!{sys.executable}\nimport json, os, sys\nrequest = json.load(open(sys.argv[4]))\n"
        head += "say = lambda x: print(json.dumps(x), file=open(request['answers'], 'a'))\n"
        script = tmp_path / "worker"
        script.write_text(head + code)
        script.chmod(0o755)
        monkeypatch.setattr(compiled.sys, "executable", str(script))

    return worker


def test_a_crash_is_an_answer_and_the_next_is_asked_all_the_same(worker):
    worker(
        "for source, flags in request['variants']:\n"
        "    if source == 'bad':\n"
        "        print('why it died', file=sys.stderr, flush=True)\n"
        "        os.kill(os.getpid(), 11)\n"
        "    say({'compiled': {'device_count': int(flags[0])}})\n"
    )
    told = []
    variants = [("a", ["1"]), ("bad", []), ("b", ["3"]), ("bad", [])]
    answers = compiled.ask_all(variants, "cpu:2", told=lambda i, answer: told.append((i, answer)))
    assert told == list(enumerate(answers))
    assert [answer["compiled"].get("error") for answer in answers] == [
        None,
        "the compiler crashed (SIGSEGV): why it died",
        None,
        "the compiler crashed (SIGSEGV): why it died",
    ]
    assert [answer["compiled"]["device_count"] for answer in answers] == [1, 2, 3, 2]


def test_what_cannot_be_is_one_sentence(worker):
    worker("say({'refused': 'batch_size=7 must divide.'})\n")
    with pytest.raises(UserError, match=r"^batch_size=7 must divide\.$"):
        compiled.ask("a", [], "cpu:2")


def test_whoever_stops_asking_ends_the_process(worker, tmp_path):
    worker(
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
        "say({'compiled': {}})\nimport time\ntime.sleep(600)\n"
    )

    def stop(i, answer):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compiled.ask_all([("a", []), ("b", [])], "cpu:2", told=stop)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
