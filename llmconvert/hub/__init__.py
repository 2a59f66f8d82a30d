"""All traffic with the Hugging Face Hub: fetching models and publishing them.

``HF_TOKEN``, ``HF_HOME``, ``HF_ENDPOINT`` and ``HF_HUB_OFFLINE`` are honoured by ``huggingface_hub`` itself; nothing
here passes a token on.
"""

from llmconvert.hub.errors import hub_errors, without_tokens
from llmconvert.hub.fetch import FetchedModel, fetch
from llmconvert.hub.push import PlannedFile, PushPlan, plan_push, push_folder

__all__ = [
    "FetchedModel",
    "PlannedFile",
    "PushPlan",
    "fetch",
    "hub_errors",
    "plan_push",
    "push_folder",
    "without_tokens",
]
