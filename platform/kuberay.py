"""Manifests for KubeRay: a RayJob that trains and a RayService that serves, each with a Ray cluster of its own.

Fields are those of the `ray.io/v1` custom resources of KubeRay 1.5.1 and later, the first with `authOptions`
(docs.ray.io, "KubeRay CRD API reference"). Every pod mounts one ReadWriteMany volume, so that run folders and models have
one path everywhere; the config of a job comes in a ConfigMap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib import metadata
from pathlib import PurePosixPath
from typing import Any

import yaml
from pydantic import Field, model_validator

from eagleray.platform.config import Config, ConfigError, load_config

_CONFIG_FOLDER, _CONFIG_FILE = "/etc/eagleray", "config.yaml"
_PORTS = {"gcs-server": 6379, "dashboard": 8265, "client": 10001}
_SERVE_PORT = 8000


class KubeSection(Config):
    """What a manifest needs to know about the Kubernetes cluster; given as `kube.KEY=VALUE`."""

    image: str
    """Image with Eagleray and the same Ray as here; docs/cluster.md builds one."""
    storage_claim: str
    """PersistentVolumeClaim (ReadWriteMany) for run folders, data and models."""
    storage_mount: str = Field(default="/storage", pattern="^/.+")
    """Where the pods mount it."""
    name: str | None = Field(default=None, pattern="^[a-z]([-a-z0-9]{0,45}[a-z0-9])?$")
    """Name of the resource. Default: made from the job's, or `serve-` and the kind of the model."""
    namespace: str | None = None
    """Namespace. Default: the one that `kubectl` uses."""
    gpu: bool = False
    """One GPU for each worker pod (implied by `ray.use_gpu: true`)."""
    gpu_resource: str = "nvidia.com/gpu"
    """Name of the GPU resource."""
    memory_gib: int = Field(default=16, ge=1)
    """Memory of a worker pod."""
    head_cpus: int = Field(default=2, ge=1)
    """CPU cores of the head pod, which runs the driver."""
    head_memory_gib: int = Field(default=8, ge=2)
    """Memory of the head pod."""
    workers: int = Field(default=1, ge=1)
    """Worker pods of a service; those of a job follow from `ray.num_workers`."""
    max_workers: int | None = Field(default=None, ge=1)
    """Most worker pods; above the number to start with, Ray's autoscaler adds and removes them."""
    token_secret: str | None = None
    """Secret with a token under `auth_token` (KubeRay 1.6). Default: KubeRay makes one."""
    keep_seconds: int = Field(default=600, ge=0)
    """How long the cluster of a finished job stays for looking at its dashboard."""
    retries: int = Field(default=0, ge=0)
    """How often a failed job is started again, on a new cluster; it resumes its run folder."""

    @model_validator(mode="after")
    def _range_is_one(self) -> KubeSection:
        if self.max_workers is not None and self.max_workers < self.workers:
            raise ValueError(f"`max_workers` is {self.max_workers}, below `workers`, which is {self.workers}")
        return self

    def on_storage(self, path: str, *, key: str) -> str:
        """A path of the pods: a relative one lies on the shared volume.

        Raises:
            ConfigError: It is absolute and lies elsewhere, where it would be lost with the pod.
        """
        mount = PurePosixPath(self.storage_mount)
        found = mount / path
        if not found.is_relative_to(mount) or ".." in found.parts:
            raise ConfigError(
                f"`{key}` is {path!r}, and pods share only `kube.storage_mount`, {self.storage_mount}. Give a path below "
                "it, or a relative one."
            )
        return str(found)


def split_settings(settings: Sequence[str]) -> tuple[KubeSection, list[str]]:
    """The `kube.KEY=VALUE` among settings, as a section, and the others."""
    kube = [setting for setting in settings if setting.startswith("kube.")]
    others = [setting for setting in settings if not setting.startswith("kube.")]
    # One key for the section, so that messages name the fields as they were written.
    return load_config(_Settings, overrides=kube or ["kube={}"]).kube, others


class _Settings(Config):
    kube: KubeSection


def ray_job(kube: KubeSection, *, name: str, config: str, workers: int, cpus: float, gpu: bool) -> str:
    """YAML of a RayJob and the ConfigMap with its config.

    Args:
        kube: The Kubernetes cluster.
        name: Name of both, unless `kube.name` is given.
        config: The job's config as YAML; its paths are those of the pods.
        workers: Worker pods to start with.
        cpus: CPU cores of one.
        gpu: Whether each has a GPU.
    """
    if kube.max_workers is not None and kube.max_workers < workers:
        raise ConfigError(
            f"`kube.max_workers` is {kube.max_workers}, and the job needs `ray.num_workers` = {workers}."
        )
    name = kube.name or name
    volume = {"name": "config", "configMap": {"name": name}}
    cluster = _cluster(
        kube, workers=workers, cpus=cpus, gpu=gpu, volumes=[(volume, _CONFIG_FOLDER)], serve=False
    )
    spec = {
        "entrypoint": f"python -m eagleray.jobs.cli train {_CONFIG_FOLDER}/{_CONFIG_FILE}",
        "submissionMode": "K8sJobMode",
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": kube.keep_seconds,
        "backoffLimit": kube.retries,
        "rayClusterSpec": cluster,
    }
    return _to_yaml(
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": _metadata(kube, name),
            "data": {_CONFIG_FILE: config},
        },
        {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": _metadata(kube, name), "spec": spec},
    )


def ray_service(
    kube: KubeSection,
    *,
    name: str,
    gateway: dict[str, Any],
    models: Sequence[dict[str, Any]],
    cpus: float,
    gpu: bool,
) -> str:
    """YAML of a RayService.

    Args:
        kube: The Kubernetes cluster.
        name: Name of the service, unless `kube.name` is given.
        gateway: The entry of `applications` in a Serve config that answers HTTP.
        models: The entries of the models, each with one deployment and without its number of replicas: of each model
            there are as many as worker pods.
        cpus: CPU cores of one replica of every model.
        gpu: Whether they share a GPU.
    """
    replicas: dict[str, Any] = {"num_replicas": kube.workers}
    if kube.max_workers is not None:
        bounds = {"min_replicas": kube.workers, "max_replicas": kube.max_workers}
        replicas = {"autoscaling_config": bounds | {"target_ongoing_requests": 64}}
    serve = {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": _SERVE_PORT},
        "applications": [
            _with_replicas(gateway, replicas),
            *(_with_replicas(one, replicas) for one in models),
        ],
    }
    spec = {
        "serveConfigV2": yaml.safe_dump(serve, sort_keys=False, allow_unicode=True),
        # The head runs no replica, so it should take no traffic.
        "excludeHeadPodFromServeSvc": True,
        "rayClusterConfig": _cluster(kube, workers=kube.workers, cpus=cpus, gpu=gpu, volumes=[], serve=True),
    }
    metadata = _metadata(kube, kube.name or name)
    return _to_yaml({"apiVersion": "ray.io/v1", "kind": "RayService", "metadata": metadata, "spec": spec})


def _with_replicas(application: dict[str, Any], replicas: dict[str, Any]) -> dict[str, Any]:
    [deployment] = application["deployments"]
    return application | {"deployments": [deployment | replicas]}


def _cluster(
    kube: KubeSection,
    *,
    workers: int,
    cpus: float,
    gpu: bool,
    volumes: Sequence[tuple[dict[str, Any], str]],
    serve: bool,
) -> dict[str, Any]:
    storage = {"name": "storage", "persistentVolumeClaim": {"claimName": kube.storage_claim}}
    volumes = [(storage, kube.storage_mount), *volumes]
    most = kube.max_workers or workers
    whole = math.ceil(cpus)  # Ray rounds a pod's cores up
    extra = {kube.gpu_resource: "1"} if gpu else {}
    worker_ports = {"serve": _SERVE_PORT} if serve else {}
    head = _pod(kube, "ray-head", kube.head_cpus, kube.head_memory_gib, {}, volumes, _PORTS | worker_ports)
    return {
        "rayVersion": metadata.version("ray"),
        "authOptions": {"mode": "token"} | ({"secretName": kube.token_secret} if kube.token_secret else {}),
        "enableInTreeAutoscaling": most > workers,
        "headGroupSpec": {
            # Replicas belong on worker pods. A job's head keeps its cores for the small tasks of Ray Data.
            "rayStartParams": {"num-cpus": "0"} if serve else {},
            "template": head,
        },
        "workerGroupSpecs": [
            {
                "groupName": "workers",
                "replicas": workers,
                "minReplicas": workers,
                "maxReplicas": most,
                "rayStartParams": {},
                "template": _pod(kube, "ray-worker", whole, kube.memory_gib, extra, volumes, worker_ports),
            }
        ],
    }


def _pod(
    kube: KubeSection,
    name: str,
    cpus: int,
    memory_gib: int,
    extra: dict[str, str],
    volumes: Sequence[tuple[dict[str, Any], str]],
    ports: dict[str, int],
) -> dict[str, Any]:
    resources = {"cpu": str(cpus), "memory": f"{memory_gib}Gi", **extra}
    container: dict[str, Any] = {
        "name": name,
        "image": kube.image,
        # Equal, or the kernel may end a worker that Ray believes to be within its memory.
        "resources": {"requests": dict(resources), "limits": dict(resources)},
        "volumeMounts": [{"name": volume["name"], "mountPath": path} for volume, path in volumes],
    }
    if ports:
        container["ports"] = [{"name": key, "containerPort": port} for key, port in ports.items()]
    return {"spec": {"containers": [container], "volumes": [dict(volume) for volume, _ in volumes]}}


def _metadata(kube: KubeSection, name: str) -> dict[str, str]:
    return {"name": name} | ({"namespace": kube.namespace} if kube.namespace else {})


class _Dumper(yaml.SafeDumper):
    """No anchors, and several lines as a block, so that people can read and edit it."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _block(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _block)


def _to_yaml(*documents: dict[str, Any]) -> str:
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, allow_unicode=True, explicit_start=True)
