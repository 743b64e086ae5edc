"""The base of every configuration section: frozen, strict, unknown keys refused."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """One block of the run description. Hydra composes it, pydantic validates it, nobody changes it."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())
