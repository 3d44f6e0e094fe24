"""What everything that a spec says is built from: frozen pydantic models that refuse what they do not know."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class Declaration(BaseModel):
    """Base of what a spec says: frozen, no unknown keys, numbers finite, and no boolean where a number is meant."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_boolean_as_number(cls, value: object, info: ValidationInfo) -> object:
        if isinstance(value, bool) and "bool" not in str(cls.model_fields[str(info.field_name)].annotation):
            said = str(value).lower()
            raise ValueError(f"should not be `{said}` (YAML reads yes, no, on and off so, unless they are quoted)")
        return value
