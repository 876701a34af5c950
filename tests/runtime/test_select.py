import dataclasses

import pytest

from mlflow_tdeploy.core.budget import Budget
from mlflow_tdeploy.core.engine import EngineRecord
from mlflow_tdeploy.core.errors import InvalidInputError
from mlflow_tdeploy.core.evidence import Evidence
from mlflow_tdeploy.core.hardware import Fingerprint, Gpu
from mlflow_tdeploy.core.manifest import Manifest, SourceRecord
from mlflow_tdeploy.core.precision import Precision
from mlflow_tdeploy.core.variant import FileRecord, Variant
from mlflow_tdeploy.runtime.backends.ort_cpu import OrtCpu
from mlflow_tdeploy.runtime.backends.ort_gpu import OrtCuda, OrtTensorRt
from mlflow_tdeploy.runtime.backends.torch_reference import TorchReference
from mlflow_tdeploy.runtime.base import RUNTIMES, Fit
from mlflow_tdeploy.runtime.policy import Policy
from mlflow_tdeploy.runtime.select import decide
from tests.bundles import SIGNATURE, accuracy

HOST = Fingerprint("linux-x86_64", "test cpu", ("avx2", "avx512_vnni"), 2)
OTHER = dataclasses.replace(HOST, cpu="another cpu")
MANIFEST = Manifest(
    1, "tensors", {}, SourceRecord("onnx", "m"), SIGNATURE, Budget.of("worst_cosine >= 0.99"), "onnx-fp32"
)


def variant(variant_id, precision="fp32", **changes):
    fused = variant_id.startswith("ort")
    base = Variant(
        id=variant_id,
        format="ort" if fused else "onnx",
        precision=Precision(precision, precision),
        device="cpu" if fused else "any",
        entry=f"files/{variant_id}/model.onnx",
        files=(FileRecord(f"files/{variant_id}/model.onnx", "0" * 64, 10),),
    )
    return dataclasses.replace(base, **changes)


def latency(variant_id, p50, host=HOST, runtime="ort-cpu", created="2026-01-01T00:00:00Z"):
    return Evidence(variant_id, "latency", {"p50_ms": p50}, host=host, settings={"runtime": runtime}, created=created)


def choose(variants, extra=(), policy=None, host=HOST, evidence=None, reference="onnx-fp32"):
    records = evidence if evidence is not None else {v.id: [accuracy(v.id)] for v in variants}
    for record in extra:
        records = {**records, record.variant: [*records.get(record.variant, []), record]}
    return decide(
        dataclasses.replace(MANIFEST, reference=reference), {v.id: v for v in variants}, records, host, policy
    )


FP32, FUSED, INT8, FP16 = (
    variant("onnx-fp32"),
    variant("ort-cpu-fp32"),
    variant("ort-cpu-int8", "int8"),
    variant("onnx-fp16", "fp16"),
)
ALL = [FP32, FUSED, INT8, FP16]


def test_decide_prefers_the_fused_graph_of_lowest_precision_when_nothing_was_measured():
    assert [c.variant for c in choose(ALL).openable] == ["ort-cpu-int8", "ort-cpu-fp32", "onnx-fp16", "onnx-fp32"]


def test_decide_ranks_by_latency_when_it_was_measured_on_this_kind_of_host():
    extra = [
        latency("ort-cpu-int8", 3.0),
        latency("ort-cpu-fp32", 2.0),
        latency("onnx-fp32", 5.0),
        latency("onnx-fp16", 9.0),
    ]
    assert [c.variant for c in choose(ALL, extra).openable] == [
        "ort-cpu-fp32",
        "ort-cpu-int8",
        "onnx-fp32",
        "onnx-fp16",
    ]


def test_decide_prefers_the_more_precise_variant_where_a_measurement_cannot_tell_them_apart():
    extra = [latency("ort-cpu-int8", 1.0), latency("ort-cpu-fp32", 1.04), latency("onnx-fp32", 1.5)]
    decision = choose([FP32, FUSED, INT8], extra)
    assert [c.variant for c in decision.openable] == ["ort-cpu-fp32", "ort-cpu-int8", "onnx-fp32"]
    assert "as fast as the one that serves, which is more precise" in decision.explain()
    faster = [latency("ort-cpu-int8", 1.0), latency("ort-cpu-fp32", 1.2), latency("onnx-fp32", 1.5)]
    assert choose([FP32, FUSED, INT8], faster).chosen.variant == "ort-cpu-int8"


def test_explain_says_why_what_could_serve_does_not():
    extra = [latency("ort-cpu-fp32", 2.0), latency("onnx-fp32", 5.0)]
    hf = variant("hf", format="hf", device="any", entry="source")
    text = choose([FP32, FUSED, hf], extra).explain()
    assert "portable graph; 2.50x the time here" in text
    if RUNTIMES.get("torch")().missing() is None:
        assert "the original model, unoptimized; serves only where nothing on ort-cpu can" in text
    assert "; " not in next(line for line in text.splitlines() if " serves " in line)
    assert text.splitlines()[-1] == "p50 ms: measured on this kind of host, one call of batch=2"
    assert "p50 ms:" not in choose([FP32]).explain()  # nothing was measured


def test_decide_ignores_latency_when_it_was_measured_on_another_kind_of_host():
    decision = choose(ALL, [latency("onnx-fp32", 0.1, host=OTHER)])
    assert decision.chosen.variant == "ort-cpu-int8"
    assert all(candidate.latency_ms is None for candidate in decision.candidates)


def test_decide_uses_the_newest_latency():
    extra = [
        latency("ort-cpu-fp32", 1.0),
        latency("ort-cpu-fp32", 7.0, created="2026-02-01T00:00:00Z"),
        latency("onnx-fp32", 5.0),
    ]
    assert choose([FP32, FUSED], extra).chosen.variant == "onnx-fp32"


def test_decide_never_chooses_a_variant_over_budget():
    evidence = {v.id: [accuracy(v.id)] for v in ALL} | {"ort-cpu-int8": [accuracy("ort-cpu-int8", passed=False)]}
    decision = choose(ALL, evidence=evidence)
    refused = next(c for c in decision.candidates if c.variant == "ort-cpu-int8")
    assert decision.chosen.variant == "ort-cpu-fp32"
    assert refused.fit is Fit.UNSUPPORTED
    assert "over budget" in refused.reason
    assert "0.9" in refused.reason
    forced = choose(ALL, evidence=evidence, policy=Policy(variant="ort-cpu-int8"))
    assert forced.chosen is None
    assert str(forced.none_left()).count("over budget") == 1  # whatever runtimes there are
    (line,) = [line for line in decision.explain().splitlines() if line.startswith("ort-cpu-int8")]
    assert line.split()[1] == "-"  # no runtime is to blame


def test_decide_believes_the_newest_accuracy_when_there_are_several():
    later = accuracy("ort-cpu-int8", passed=False, created="2026-03-01T00:00:00Z")
    assert choose([FP32, INT8], [later]).chosen.variant == "onnx-fp32"


def test_decide_needs_evidence_unless_the_variant_is_the_reference():
    decision = choose([FP32, FUSED], evidence={})
    assert decision.chosen.variant == "onnx-fp32"
    assert "no accuracy evidence" in next(c.reason for c in decision.candidates if c.variant == "ort-cpu-fp32")


def test_decide_takes_the_forced_variant_and_says_so_for_the_others():
    decision = choose(ALL, policy=Policy(variant="onnx-fp32"))
    assert [c.variant for c in decision.openable] == ["onnx-fp32"]
    assert "'onnx-fp32' is forced" in decision.explain()


def test_decide_refuses_unknown_names():
    with pytest.raises(InvalidInputError, match="Unknown variant 'int9'.*onnx-fp32"):
        choose(ALL, policy=Policy(variant="int9"))
    with pytest.raises(InvalidInputError, match="Unknown runtime 'trt9'.*ort-cpu"):
        choose(ALL, policy=Policy(runtime="trt9"))


@pytest.mark.parametrize(
    ("has", "variant_id", "why"),
    [
        ({"tensorrt": "10.8.0.43"}, "trt-fp32-sm90", "this kind"),
        ({"tensorrt": "10.8.0"}, "trt-fp32-sm90", "this kind"),
        ({"tensorrt": "10.9.0.34"}, "onnx-fp32", "this host has 10.9.0.34"),
        ({"python": "3.12.3"}, "onnx-fp32", "this host's is not known"),
    ],
)
def test_what_a_server_has_decides_for_it_and_not_what_is_installed_here(has, variant_id, why):
    """No TensorRT is needed here for a plan to go to a server that has it."""
    gpu = Gpu("NVIDIA H100", "9.0", 80 << 30, "570.86.10", "12.8")
    made = EngineRecord("tensorrt", "10.8.0.43", "linux-x86_64", gpu.name, "9.0", gpu.driver, gpu.cuda)
    plan = variant("trt-fp32-sm90", format="trt", device="cuda", engine=made)
    host = dataclasses.replace(HOST, gpu=gpu, software=has)
    records = {one.id: [accuracy(one.id)] for one in (FP32, plan)}
    decision = decide(MANIFEST, {FP32.id: FP32, plan.id: plan}, records, host, triton=True)
    assert decision.chosen.variant == variant_id
    (said,) = [c.reason for c in decision.candidates if c.variant == plan.id]
    assert why in said


def test_decide_names_what_a_host_lacks():
    old = dataclasses.replace(FUSED, requires={"onnxruntime": "99.0"})
    cuda = dataclasses.replace(FP16, device="cuda")
    plan = dataclasses.replace(FP32, id="trt-fp16-sm90", format="warp")
    reasons = {c.variant: c.reason for c in choose([old, cuda, plan]).candidates}
    assert "needs onnxruntime >= 99.0" in reasons["ort-cpu-fp32"]
    assert "made for CUDA" in reasons["onnx-fp16"]
    assert "no runtime opens the format 'warp'" in reasons["trt-fp16-sm90"]


def test_decide_names_the_device_when_no_runtime_knows_it():
    decision = choose([FP32, dataclasses.replace(FUSED, device="npu"), dataclasses.replace(INT8, format="openvino")])
    reasons = {c.variant: c.reason for c in decision.candidates}
    assert decision.chosen.variant == "onnx-fp32"
    assert reasons["ort-cpu-fp32"] == "made for npu"
    assert "no runtime opens the format 'openvino'" in reasons["ort-cpu-int8"]
    original = dataclasses.replace(HF, device="npu")
    assert TorchReference().probe(HOST, original).reason == "made for npu"


def test_decide_shows_variants_that_cannot_be_read_as_candidates_that_never_serve():
    records = {FP32.id: [accuracy(FP32.id)]}
    lost = {"trt-fp16-sm90": "written by a newer mlflow-tdeploy (schema 2)"}
    decision = decide(MANIFEST, {FP32.id: FP32}, records, HOST, Policy(strict=True), absent=lost)
    assert decision.chosen.variant == "onnx-fp32"
    assert decision.failures == ()
    assert decision.candidates[-1].fit is Fit.UNSUPPORTED
    assert "trt-fp16-sm90  -        unsupported  -       written by a newer" in decision.explain()
    forced = decide(MANIFEST, {FP32.id: FP32}, records, HOST, Policy(variant="trt-fp16-sm90"), absent=lost)
    assert forced.chosen is None
    assert "trt-fp16-sm90: written by a newer mlflow-tdeploy (schema 2)" in str(forced.none_left())


def test_decide_says_failed_and_not_over_budget_of_a_variant_without_any_answer():
    failed = dataclasses.replace(accuracy(INT8.id), passed=False, metrics={}, violations=("no answer at batch=1",))
    decision = choose([FP32, INT8], evidence={FP32.id: [accuracy(FP32.id)], INT8.id: [failed]})
    assert decision.candidates[-1].reason == "failed: no answer at batch=1"


def test_decide_needs_the_newest_verdict_unless_the_variant_is_the_reference():
    evidence = {v.id: [accuracy(v.id)] for v in (FP32, FUSED)}
    doubts = {"ort-cpu-fp32": "evidence/x.json is damaged", "onnx-fp32": "evidence/y.json is damaged"}
    decision = decide(MANIFEST, {v.id: v for v in (FP32, FUSED)}, evidence, HOST, doubts=doubts)
    assert decision.chosen.variant == "onnx-fp32"
    reason = next(c.reason for c in decision.candidates if c.variant == "ort-cpu-fp32")
    assert reason == "its accuracy evidence cannot be read here: evidence/x.json is damaged"


def test_decide_ranks_int8_last_of_the_fused_when_the_cpu_has_no_int8_dot_product():
    old_cpu = dataclasses.replace(HOST, cpu_features=("avx2",))
    assert [c.variant for c in choose([FUSED, INT8], host=old_cpu).openable] == ["ort-cpu-fp32", "ort-cpu-int8"]


def test_decision_openable_holds_one_candidate_when_strict():
    assert len(choose(ALL, policy=Policy(strict=True)).openable) == 1


def test_decision_failed_moves_on_and_keeps_the_reason():
    decision = choose(ALL)
    after = decision.failed(decision.chosen, "cannot open")
    assert after.chosen.variant == "ort-cpu-fp32"
    assert after.failures == ("ort-cpu-int8 on ort-cpu: cannot open",)


def test_policy_of_prefers_what_is_said_now_then_the_environment_then_what_was_saved():
    saved = {"variant": "logged", "runtime": "", "strict": False}
    assert Policy.of({}, {}, saved) == Policy("logged", None, False)
    assert Policy.of({}, {"TDEPLOY_VARIANT": "host", "TDEPLOY_STRICT": "1"}, saved) == Policy("host", None, True)
    assert Policy.of({"variant": "now"}, {"TDEPLOY_VARIANT": "host"}, saved) == Policy("now", None, False)
    assert Policy.of({"variant": ""}, {}, saved) == Policy(None, None, False)
    assert Policy.of({"variant": ""}, {"TDEPLOY_VARIANT": "host"}, saved) == Policy("host", None, False)


def test_what_was_measured_to_be_slower_here_is_no_better_choice_that_is_lacking():
    """It needs a newer ONNX Runtime and would not be taken with it: that is no fallback."""
    slow = dataclasses.replace(FP16, requires={"onnxruntime": "99.0"})
    evidence = {
        v.id: [accuracy(v.id), latency(v.id, ms)] for v, ms in ((FP32, 2.0), (FUSED, 5.0), (slow, 50.0))
    }  # fmt: skip
    decision = choose([FP32, FUSED, slow], evidence=evidence, policy=Policy(strict=True))
    assert (decision.chosen.variant, decision.failures) == ("onnx-fp32", ())


def test_a_graph_that_would_fit_worse_is_no_better_choice_either():
    slow = dataclasses.replace(FP16, requires={"onnxruntime": "99.0"})
    assert choose([FUSED, slow]).failures == ()


def test_a_fused_graph_that_this_host_is_too_old_for_is_a_better_choice():
    new = dataclasses.replace(FUSED, requires={"onnxruntime": "99.0"})
    assert choose([FP32, new]).failures[0].startswith("ort-cpu-fp32 on ort-cpu: needs onnxruntime >= 99.0")


def test_explain_makes_up_no_ratio_to_what_was_not_measured():
    evidence = {FUSED.id: [accuracy(FUSED.id)], FP32.id: [accuracy(FP32.id), latency(FP32.id, 7.0)]}
    text = choose([FUSED, FP32], evidence=evidence).explain()
    assert "ranks after one that was not measured on this kind of host" in text
    assert "x the time here" not in text


def test_a_runtime_that_opens_none_of_the_formats_is_said_to():
    error = choose([FP32, FUSED], policy=Policy(runtime="torch")).none_left()
    assert "The runtime 'torch' opens the format hf, which no variant of this model has." in str(error)


def test_the_environment_overrules_what_was_saved_and_says_so(caplog):
    environ = {"TDEPLOY_VARIANT": "ort-cpu-fp32"}
    Policy.of({}, environ, {"variant": "onnx-fp32"})
    assert "TDEPLOY_VARIANT=ort-cpu-fp32 overrules variant='onnx-fp32', saved with the model" in caplog.text
    caplog.clear()
    Policy.of({"variant": "onnx-fp32"}, environ, {"variant": "onnx-fp32"})
    Policy.of({}, environ, {"variant": ""})
    Policy.of({}, environ, {"variant": "ort-cpu-fp32"})
    assert caplog.text == ""


@pytest.mark.parametrize(("environ", "where"), [({"TDEPLOY_STRICT": "maybe"}, r" \(TDEPLOY_STRICT\)"), ({}, "")])
def test_a_value_that_cannot_be_read_names_where_it_comes_from(environ, where):
    config = {} if environ else {"strict": "maybe"}
    with pytest.raises(InvalidInputError, match=rf"'strict' must be of type bool, got 'maybe'{where}\.$"):
        Policy.of(config, environ)


def test_errors_name_where_a_forced_value_comes_from():
    """Who gets the error has often set nothing: an operator or whoever logged the model did."""
    by_host = Policy.of({}, {"TDEPLOY_VARIANT": "ort-cpu-fp32", "TDEPLOY_STRICT": "1"}, {"runtime": "torch"})
    asked = "asked for: variant='ort-cpu-fp32' (TDEPLOY_VARIANT), runtime='torch' (saved with the model), strict=True"
    assert asked in str(choose(ALL, policy=by_host).none_left())
    by_caller = Policy.of({"variant": "ort-cpu-fp32"}, {"TDEPLOY_VARIANT": "onnx-fp32"}, {"variant": "hf"})
    assert by_caller.asked() == "variant='ort-cpu-fp32'"
    with pytest.raises(InvalidInputError, match=r"Unknown variant 'int9' \(TDEPLOY_VARIANT\)"):
        choose(ALL, policy=Policy.of({}, {"TDEPLOY_VARIANT": "int9"}))
    with pytest.raises(InvalidInputError, match=r"Unknown runtime 'trt9'.*\(TDEPLOY_RUNTIME\)"):
        choose(ALL, policy=Policy.of({}, {"TDEPLOY_RUNTIME": "trt9"}))


def test_policy_of_reads_config_before_environment():
    environ = {"TDEPLOY_VARIANT": "a", "TDEPLOY_STRICT": "true", "TDEPLOY_RUNTIME": ""}
    assert Policy.of({}, environ) == Policy("a", None, True)
    assert Policy.of({"variant": "b", "strict": "no"}, environ) == Policy("b", None, False)
    assert Policy.of({"strict": False}, environ) == Policy("a", None, False)
    assert Policy.of({"strict": ""}, environ) == Policy("a", None, True)
    assert Policy.of({"runtime": "ort-cpu"}, {}) == Policy(None, "ort-cpu", False)
    with pytest.raises(InvalidInputError, match="'strict'"):
        Policy.of({"strict": "perhaps"}, {})


HF = variant("hf", format="hf", entry="source")


def lacks_onnxruntime(monkeypatch):
    monkeypatch.setattr(OrtCpu, "missing", lambda self: "onnxruntime is not installed (pip install x)")


def test_decide_names_what_the_host_lacks_when_the_original_serves_instead(monkeypatch):
    lacks_onnxruntime(monkeypatch)
    manifest = dataclasses.replace(MANIFEST, reference="hf")
    decision = decide(manifest, {v.id: v for v in [HF, FUSED]}, {FUSED.id: [accuracy(FUSED.id)]}, HOST)
    assert decision.chosen.variant == "hf"
    assert decision.failures == ("ort-cpu-fp32 on ort-cpu: onnxruntime is not installed (pip install x)",)


def test_decide_refuses_the_original_when_strict_and_a_runtime_is_missing(monkeypatch):
    lacks_onnxruntime(monkeypatch)
    manifest = dataclasses.replace(MANIFEST, reference="hf")
    records = {FUSED.id: [accuracy(FUSED.id)]}
    decision = decide(manifest, {v.id: v for v in [HF, FUSED]}, records, HOST, Policy(strict=True))
    assert decision.chosen is None
    assert decision.openable == ()
    assert "onnxruntime is not installed" in str(decision.none_left())
    forced = decide(manifest, {v.id: v for v in [HF, FUSED]}, records, HOST, Policy(variant="hf", strict=True))
    assert forced.chosen.variant == "hf"
    assert forced.failures == ()


def test_decide_names_a_better_variant_when_the_runtime_is_too_old_for_it():
    newer = dataclasses.replace(INT8, requires={"onnxruntime": "99.0"})
    decision = choose([FP32, FUSED, newer])
    assert decision.chosen.variant == "ort-cpu-fp32"
    assert "ort-cpu-int8" in decision.failures[0]
    assert choose([FP32, FUSED, newer], policy=Policy(strict=True)).chosen is None


def test_decide_calls_it_no_fallback_when_the_better_variant_is_over_budget():
    evidence = {v.id: [accuracy(v.id)] for v in ALL} | {INT8.id: [accuracy(INT8.id, passed=False)]}
    decision = choose(ALL, evidence=evidence, policy=Policy(strict=True))
    assert decision.chosen.variant == "ort-cpu-fp32"
    assert decision.failures == ()


def test_decide_keeps_the_fastest_when_another_host_adds_a_variant_that_was_not_measured_here():
    extra = [latency("ort-cpu-fp32", 1.0), latency("onnx-fp32", 2.0), latency("ort-cpu-int8", 5.0)]
    decision = choose(ALL, extra)
    assert [c.variant for c in decision.openable] == ["ort-cpu-fp32", "onnx-fp32", "ort-cpu-int8", "onnx-fp16"]
    assert "; not measured on this kind of host" in decision.explain()


def test_decide_ignores_latency_when_not_every_candidate_was_measured_here():
    decision = choose(ALL, [latency("onnx-fp16", 900.0)])
    assert [c.variant for c in decision.openable] == ["ort-cpu-int8", "ort-cpu-fp32", "onnx-fp16", "onnx-fp32"]
    assert next(c for c in decision.candidates if c.variant == "onnx-fp16").latency_ms == 900.0


def _with_gpu(monkeypatch):
    """A host whose only further difference is a GPU runtime that opens portable graphs."""
    monkeypatch.setattr(OrtCuda, "missing", lambda self: None)
    monkeypatch.setattr(OrtCuda, "version", lambda self: "1.31.1")
    monkeypatch.setattr(OrtTensorRt, "missing", lambda self: "not installed")
    return dataclasses.replace(HOST, gpu=Gpu("NVIDIA H200", "9.0", 1, "580.1", "13.0"))


def test_a_cpus_verdict_on_half_precision_says_nothing_about_a_gpu(monkeypatch):
    """There ONNX Runtime computes in fp16, here in fp32 with casts."""
    host = _with_gpu(monkeypatch)
    on_cpu, on_gpu = (
        dataclasses.replace(accuracy("onnx-fp16"), settings={"runtime": name}, created=f"2026-01-0{day}T00:00:00Z")
        for day, name in enumerate(("ort-cpu", "ort-cuda"), 1)
    )
    passed = {"onnx-fp32": [dataclasses.replace(accuracy("onnx-fp32"), settings={"runtime": "ort-cpu"})]}
    before = choose([FP32, FP16], host=host, evidence={**passed, "onnx-fp16": [on_cpu]})
    assert (before.chosen.variant, before.chosen.runtime) == ("onnx-fp32", "ort-cuda")
    reasons = {(c.variant, c.runtime): c.reason for c in before.candidates}
    assert reasons["onnx-fp16", "ort-cuda"] == "fp16 was not verified on a GPU yet (tdeploy verify)"
    assert next(c for c in before.candidates if (c.variant, c.runtime) == ("onnx-fp16", "ort-cpu")).can_open
    after = choose([FP32, FP16], host=host, evidence={**passed, "onnx-fp16": [on_cpu, on_gpu]})
    assert (after.chosen.variant, after.chosen.runtime) == ("onnx-fp16", "ort-cuda")
    reference = choose([FP16], host=host, evidence={"onnx-fp16": [on_cpu]}, reference="onnx-fp16")
    assert (reference.chosen.variant, reference.chosen.runtime) == ("onnx-fp16", "ort-cuda")  # it needs no verdict
    failed = dataclasses.replace(on_gpu, passed=False, violations=("worst_cosine is 0.5",))
    for order in ([failed, on_cpu], [on_cpu, failed]):  # the newest there is may be from either
        dated = [dataclasses.replace(one, created=f"2026-02-0{day}T00:00:00Z") for day, one in enumerate(order, 1)]
        decision = choose([FP32, FP16], host=host, evidence={**passed, "onnx-fp16": dated})
        assert (decision.chosen.variant, decision.chosen.runtime) == ("onnx-fp32", "ort-cuda")
        assert next(c for c in decision.candidates if (c.variant, c.runtime) == ("onnx-fp16", "ort-cpu")).can_open
    elsewhere = dataclasses.replace(on_cpu, settings={"runtime": "some-new-npu"})
    decision = choose([FP32, FP16], evidence={**passed, "onnx-fp16": [elsewhere]})
    reasons = {c.runtime: c.reason for c in decision.candidates if c.variant == "onnx-fp16"}
    assert reasons["ort-cpu"] == "fp16 was not verified on a CPU yet (tdeploy verify)"
    assert reasons["ort-cuda"] == "no NVIDIA GPU on this host"  # what a GPU's verdict would be says nothing there
    again = dataclasses.replace(on_cpu, created="2026-01-03T00:00:00Z")  # newer, and from elsewhere
    decision = choose([FP32, FP16], host=host, evidence={**passed, "onnx-fp16": [failed, again]})
    assert (
        "over budget: worst_cosine is 0.5"
        in {(c.variant, c.runtime): c.reason for c in decision.candidates}["onnx-fp16", "ort-cuda"]
    )
