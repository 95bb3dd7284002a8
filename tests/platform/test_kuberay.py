"""Manifests: only fields that KubeRay's resources have, with their types, and what the config asked for in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field

from eagleray.jobs import serve, submit
from eagleray.jobs.registry import load_job
from eagleray.platform.config import ConfigError, load_config
from eagleray.platform.kuberay import KubeSection

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "configs" / "gram" / "finetune_tiny.yaml"
KUBE = ["kube.image=registry/eagleray:1", "kube.storage_claim=runs"]


# The part of the `ray.io/v1` resources that we write, from the CRD reference of KubeRay (1.7; all but `secretName` is
# in 1.5.1), and of core/v1. Kubernetes refuses unknown fields and wrong types; so do these.
class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Mount(_Strict):
    name: str
    mountPath: str


class _Named(_Strict):
    name: str


class _Claim(_Strict):
    claimName: str


class _Volume(_Strict):
    name: str
    persistentVolumeClaim: _Claim | None = None
    configMap: _Named | None = None


class _Port(_Strict):
    name: str = Field(pattern="^[a-z-]{1,15}$")
    containerPort: int


class _Resources(_Strict):
    requests: dict[str, str]
    limits: dict[str, str]


class _Container(_Strict):
    name: str
    image: str
    resources: _Resources
    volumeMounts: list[_Mount]
    ports: list[_Port] = []


class _PodSpec(_Strict):
    containers: list[_Container]
    volumes: list[_Volume]


class _Pod(_Strict):
    spec: _PodSpec


class _Head(_Strict):
    rayStartParams: dict[str, str]
    template: _Pod


class _Workers(_Head):
    groupName: str
    replicas: int
    minReplicas: int
    maxReplicas: int


class _Auth(_Strict):
    mode: Literal["disabled", "token"]
    secretName: str | None = None


class _Cluster(_Strict):
    rayVersion: str
    authOptions: _Auth
    enableInTreeAutoscaling: bool
    headGroupSpec: _Head
    workerGroupSpecs: list[_Workers]


class _JobSpec(_Strict):
    entrypoint: str
    submissionMode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]
    shutdownAfterJobFinishes: bool
    ttlSecondsAfterFinished: int
    backoffLimit: int
    rayClusterSpec: _Cluster


class _ServiceSpec(_Strict):
    serveConfigV2: str
    excludeHeadPodFromServeSvc: bool
    rayClusterConfig: _Cluster


class _Metadata(_Strict):
    name: str
    namespace: str | None = None


class _Job(_Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: _Metadata
    spec: _JobSpec


class _Service(_Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayService"]
    metadata: _Metadata
    spec: _ServiceSpec


def job(*settings: str) -> tuple[_Job, dict[str, Any]]:
    """The resource and the text of the config that comes with it."""
    config_map, resource = yaml.safe_load_all(submit.render(TINY, [*KUBE, *settings]))
    assert config_map["kind"] == "ConfigMap" and config_map["metadata"] == resource["metadata"]
    return _Job.model_validate(resource), yaml.safe_load(config_map["data"]["config.yaml"])


def test_a_job_gets_a_pod_a_worker_and_its_config(tmp_path: Path) -> None:
    found, values = job(
        "ray.num_workers=2", "ray.cpus_per_worker=1.5", "ray.use_gpu=true", "kube.namespace=lab"
    )
    cluster = found.spec.rayClusterSpec
    [workers] = cluster.workerGroupSpecs
    assert (workers.replicas, workers.minReplicas, workers.maxReplicas) == (2, 2, 2)
    assert not cluster.enableInTreeAutoscaling and found.spec.shutdownAfterJobFinishes
    [container] = workers.template.spec.containers
    assert container.resources.limits == {"cpu": "2", "memory": "16Gi", "nvidia.com/gpu": "1"}
    assert container.resources.requests == container.resources.limits
    assert cluster.authOptions.mode == "token" and found.metadata.namespace == "lab"
    # The config is one that the entrypoint can read where it is mounted.
    assert found.spec.entrypoint.endswith("train /etc/eagleray/config.yaml")
    [head] = cluster.headGroupSpec.template.spec.containers
    assert {m.name: m.mountPath for m in head.volumeMounts} == {
        "storage": "/storage",
        "config": "/etc/eagleray",
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    cfg = load_config(load_job("gram.finetune").Config, tmp_path / "config.yaml")
    assert cfg.run.dir is not None and cfg.run.dir.startswith("/storage/runs/gram.finetune/")
    assert cfg.ray.use_gpu is True and cfg.ray.num_workers == 2


def test_more_pods_than_to_start_with_is_autoscaling() -> None:
    found, _ = job("kube.max_workers=4", "kube.token_secret=token", "kube.name=first", "kube.retries=2")
    cluster = found.spec.rayClusterSpec
    assert cluster.enableInTreeAutoscaling and cluster.workerGroupSpecs[0].maxReplicas == 4
    assert cluster.authOptions.secretName == "token" and found.spec.backoffLimit == 2
    assert found.metadata.name == "first"


def test_a_service_holds_a_serve_config_that_ray_accepts() -> None:
    from ray.serve.schema import ServeDeploySchema

    settings = ["gram=runs/a/model", "gram.cpus=4", "kube.gpu=true", "kube.max_workers=3", *KUBE]
    [resource] = yaml.safe_load_all(serve.render(settings))
    found = _Service.model_validate(resource)
    config = ServeDeploySchema.model_validate(yaml.safe_load(found.spec.serveConfigV2))
    gateway, application = config.applications
    assert gateway.route_prefix == "/" and application.route_prefix is None
    assert application.import_path == "eagleray.serve.gram:build_app"
    assert application.args["model"] == "/storage/runs/a/model" and application.args["gpus"] == 1
    scaling = application.deployments[0].autoscaling_config
    assert isinstance(scaling, dict) and (scaling["min_replicas"], scaling["max_replicas"]) == (1, 3)
    cluster = found.spec.rayClusterConfig
    assert cluster.headGroupSpec.rayStartParams == {"num-cpus": "0"} and cluster.enableInTreeAutoscaling
    [container] = cluster.workerGroupSpecs[0].template.spec.containers
    assert container.resources.limits["cpu"] == "4" and [p.containerPort for p in container.ports] == [8000]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["kube.storage_claim=runs"], r"`kube\.image` is required"),
        (
            [*KUBE, "run.dir=/tmp/x"],
            r"`run\.dir` is '/tmp/x', and pods share only `kube\.storage_mount`, /storage",
        ),
        ([*KUBE, "run.dir=../x"], r"`run\.dir` is '\.\./x', and pods share only"),
        ([*KUBE, "kube.max_workers=1", "ray.num_workers=2"], r"`kube\.max_workers` is 1, and the job needs"),
        ([*KUBE, "kube.name=Not_A_Name"], r"`kube\.name`: String should match pattern"),
    ],
)
def test_what_cannot_be_rendered(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        submit.render(TINY, settings)


def test_a_service_cannot_have_less_pods_than_it_starts_with() -> None:
    with pytest.raises(ValueError, match="`max_workers` is 1, below `workers`, which is 2"):
        KubeSection(image="a", storage_claim="b", workers=2, max_workers=1)
