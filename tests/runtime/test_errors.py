import grpc
import pytest

from runtime import errors
from workers.errors import BadTensor


def test_every_error_of_the_table_has_its_own_label() -> None:
    labels = [label for _, label in errors.STATUS.values()]
    assert len(set(labels)) == len(labels)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.BadRequest("x"), grpc.StatusCode.INVALID_ARGUMENT),
        (errors.Overloaded("x"), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (BadTensor("x"), grpc.StatusCode.FAILED_PRECONDITION),  # by its parent, CheckpointError
        (KeyError("x"), grpc.StatusCode.INTERNAL),
    ],
)
def test_status_is_that_of_the_nearest_class(error: BaseException, code: grpc.StatusCode) -> None:
    assert errors.status_of(error)[0] is code


def test_every_error_class_of_the_runtime_is_known_by_name() -> None:
    classes = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, errors.MobulaError)]
    assert {cls.__name__ for cls in classes} == set(errors.BY_NAME)
