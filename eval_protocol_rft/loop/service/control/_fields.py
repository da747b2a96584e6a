"""The fields that the control plane's messages have, and how requests are read by them.

Invariant: a field that a message does not have, or that has another type, is refused by its name;
nothing that a client sends is dropped in silence. Names may be written `camelCase` or `snake_case`,
as in the JSON form of protobuf; what is kept is `camelCase`.

The tables are the union of what `fireworks-ai` 0.19.20 (protobuf) and 1.2.12 to 1.2.30 (JSON) may
send. Most of it is about machines, and is kept and given back without a meaning here.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from typing import Any

from eval_protocol_rft.loop.service._errors import ServiceError

Fields = Mapping[str, Any]
"""Name -> a type (str, int, float, bool, list, dict), or the fields of a message."""

_OUTPUT: Fields = {
    "name": str, "createTime": str, "updateTime": str, "createdBy": str, "state": str,
    "status": dict,
}  # fmt: skip
"""What the service sets. A client that changes a resource it was given sends them back."""

DATASET: Fields = {
    **_OUTPUT, "accessPolicy": str, "averageTurnCount": float, "displayName": str,
    "draftModelStates": dict, "estimatedTokenCount": int, "evalProtocol": dict,
    "evaluationResult": dict, "exampleCount": int, "externalUrl": str, "fireworksTraced": dict,
    "format": str, "sourceJobName": str, "splitted": dict, "transformed": dict,
    "userUploaded": dict,
}  # fmt: skip

MODEL: Fields = {
    **_OUTPUT, "annotations": dict, "baseModelDetails": dict, "calibrated": bool, "cluster": str,
    "contextLength": int, "conversationConfig": dict, "defaultDraftModel": str,
    "defaultDraftTokenCount": int, "defaultSamplingParams": dict, "deployedModelRefs": list,
    "deprecationDate": dict, "description": str, "displayName": str, "fineTuningJob": str,
    "githubUrl": str, "huggingFaceUrl": str, "importedFrom": str, "kind": str,
    "peftDetails": dict, "public": bool, "rlTunable": bool, "snapshotType": str,
    "supportsImageInput": bool, "supportsLora": bool, "supportsTools": bool,
    "teftDetails": dict, "trainingContextLength": int, "tunable": bool,
    "useHfApplyChatTemplate": bool,
}  # fmt: skip

_AUTOSCALING: Fields = {
    "scaleUpWindow": str, "scaleDownWindow": str, "scaleToZeroWindow": str, "loadTargets": dict,
}  # fmt: skip

DEPLOYMENT: Fields = {
    **_OUTPUT, "acceleratorCount": int, "acceleratorType": str, "activeModelVersion": str,
    "annotations": dict, "autoTune": {"longPrompt": bool}, "autoscalingPolicy": _AUTOSCALING,
    "baseModel": str, "cluster": str, "deleteTime": str, "deploymentShape": str,
    "deploymentTemplate": str, "description": str, "desiredReplicaCount": int,
    "directRouteApiKeys": list, "directRouteHandle": str, "directRouteType": str,
    "disableAccounting": bool, "disableDeploymentSizeValidation": bool,
    "disaggregatedPrefillCount": int, "disaggregatedPrefillWorldSize": int, "displayName": str,
    "draftModel": str, "draftTokenCount": int, "enableAddons": bool, "enableHotLoad": bool,
    "enableHotReloadLatestAddon": bool, "enableMtp": bool, "enableSessionAffinity": bool,
    "engine": str, "expireTime": str, "extraArgs": list, "extraValues": dict,
    "forTraining": bool, "generatorCount": int, "hotLoadBucketType": str,
    "hotLoadBucketUrl": str, "hotLoadTrainerJob": str, "hotLoadTransitionType": str,
    "imageTag": str, "kvCacheMemoryPct": int, "maxBatchSize": int, "maxContextLength": int,
    "maxPeftBatchSize": int, "maxReplicaCount": int, "maxWithRevocableReplicaCount": int,
    "minReplicaCount": int, "ngramSpeculationLength": int, "numPeftDeviceCached": int,
    "placement": {"region": str, "multiRegion": str, "regions": list}, "precision": str,
    "preemptible": bool, "pricingPlanId": str, "purgeTime": str, "region": str,
    "replicaCount": int, "replicaStats": dict, "spot": bool, "targetModelVersion": str,
    "workload": str, "worldSize": int,
}  # fmt: skip

DEPLOYED_MODEL: Fields = {
    **_OUTPUT, "default": bool, "deployment": str, "description": str, "displayName": str,
    "isLoadBalancerStickySession": bool, "loadBalancerName": str,
    "loadBalancerReplicaCapacity": float, "model": str, "public": bool, "serverless": bool,
}  # fmt: skip

_TRAINING_CONFIG: Fields = {
    "acceleratorCount": int, "acceleratorType": str, "baseModel": str,
    "baseModelWeightPrecision": str, "batchSize": int, "batchSizeSamples": int,
    "customImageTag": str, "epochs": int, "extraArgs": list, "gradientAccumulationSteps": int,
    "isIntermediate": bool, "jinjaTemplate": str, "learningRate": float,
    "learningRateWarmupSteps": int, "loraRank": int, "maxContextLength": int,
    "optimizerWeightDecay": float, "outputModel": str, "projectionHeadDim": int, "region": str,
    "samplerCheckpointSaveIntervalSteps": int, "toleration": str, "warmStartFrom": str,
}  # fmt: skip

JOB: Fields = {
    **_OUTPUT, "awsS3Config": dict, "azureBlobStorageConfig": dict, "completedTime": str,
    "dataset": str, "disableInactivityCleanup": bool, "displayName": str,
    "evalAutoCarveout": bool, "evaluationDataset": str, "extraValues": dict,
    "forwardOnly": bool, "hotLoadDeploymentId": str, "inactivityTimeout": str,
    "jobProgress": dict, "keepAlive": bool,
    "lossConfig": {"dpo": dict, "klBeta": float, "method": str}, "managedBy": str,
    "nodeCount": int, "preemptible": bool, "purpose": str,
    "reinforcementFineTuningEpochId": str, "reservationTarget": str, "rewardWeights": list,
    "rolloutDeploymentName": str, "serviceMode": bool, "trainerReplicaCount": int,
    "trainingConfig": _TRAINING_CONFIG, "usePurpose": str, "useReservation": bool,
    "wandbConfig": {
        "apiKey": str, "enabled": bool, "entity": str, "project": str, "runId": str, "url": str,
    },
}  # fmt: skip

PROMOTION: Fields = {
    "outputModel": str, "trainerJobId": str, "baseModel": str, "asyncPromotion": bool,
    "hotLoadDeploymentId": str,
}  # fmt: skip

_LARGE = 2**63


def read_fields(body: Mapping[str, Any], fields: Fields, where: str) -> dict[str, Any]:
    """A message as it is kept. Null is a field that was not sent.

    Args:
        body: as it came.
        fields: those that it may have.
        where: what messages call it.

    Raises:
        ServiceError: it has another field, or a value of another type.
    """
    values: dict[str, Any] = {}
    for given, value in body.items():
        name = camel_case(given)
        if name not in fields:
            close = difflib.get_close_matches(name, fields, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ServiceError(f"unknown field {given!r} in {where}{hint}")
        if name in values:
            raise ServiceError(f"field {name!r} of {where} is there twice, as {given!r} as well")
        if value is not None:
            values[name] = _value(value, fields[name], f"{where}.{name}")
    return values


def read_mask(mask: str, fields: Fields, where: str) -> list[str]:
    """Names of a field mask (`a_b,c`), in camelCase; of a path, its first part.

    Raises:
        ServiceError: it names a field that there is not.
    """
    paths = [path.strip() for path in mask.split(",") if path.strip()]
    names = [camel_case(path.partition(".")[0]) for path in paths]
    for path, name in zip(paths, names, strict=True):
        if name not in fields:
            raise ServiceError(f"unknown field {path!r} in the update mask of {where}")
    return names


def camel_case(name: str) -> str:
    """`camelCase` of `snake_case`; what has no underscore is as it was."""
    head, *rest = name.split("_")
    return head + "".join(part[:1].upper() + part[1:] for part in rest)


def need(values: Mapping[str, Any], name: str, where: str) -> Any:
    """A field that must be there and not be empty.

    Raises:
        ServiceError: it is not.
    """
    value = values.get(name)
    if value in (None, ""):
        raise ServiceError(f"{where} needs {name!r}")
    return value


def one_of(value: str, choices: tuple[str, ...], where: str) -> str:
    """An enum's value.

    Raises:
        ServiceError: it is none.
    """
    if value not in choices:
        raise ServiceError(f"{where} is {value!r}: it is one of {', '.join(choices)}")
    return value


def _value(value: Any, wanted: Any, where: str) -> Any:
    if isinstance(wanted, Mapping):
        if not isinstance(value, Mapping):
            raise _other_type(value, "an object", where)
        return read_fields(value, wanted, where)
    if wanted is int:
        return read_integer(value, where)
    if wanted is float:
        number = _number(value)
        if number is None:
            raise _other_type(value, "a number", where)
        return number
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        kinds = {str: "text", bool: "true or false", list: "a list", dict: "an object"}
        raise _other_type(value, kinds[wanted], where)
    return value


def read_integer(value: Any, where: str) -> int:
    """A whole number of 64 bits; they travel as text as well.

    Raises:
        ServiceError: it is none.
    """
    if isinstance(value, str) and re.fullmatch(r"-?\d{1,19}", value, re.ASCII):
        value = int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not -_LARGE <= value < _LARGE:
        raise _other_type(value, "a whole number", where)
    return value


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _other_type(value: Any, wanted: str, where: str) -> ServiceError:
    return ServiceError(f"{where} is {str(value)[:80]!r}: it must be {wanted}")
