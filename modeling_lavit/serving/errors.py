"""Errors as OpenAI's API tells them: `{"error": {"message", "type", "param", "code"}}` with the right status."""

import logging

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException


logger = logging.getLogger("ray.serve")

# status -> type, where an error does not say it
TYPES = {
    401: "authentication_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}
PART_TYPES = ("text", "image_url")


class ApiError(Exception):
    """What a client is told.

    Args:
        status: of HTTP.
        message: what was given and what to do.
        param: the field that is at fault.
        code: a word for programs.
        retry_after: seconds, for the header of that name.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after = retry_after

    def response(self) -> JSONResponse:
        """The error as an answer."""
        kind = TYPES.get(self.status, "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        headers = {"Retry-After": str(self.retry_after)} if self.retry_after else None
        return JSONResponse({"error": error}, status_code=self.status, headers=headers)


def refuse_validation(error: RequestValidationError | ValidationError) -> ApiError:
    """The first thing that is wrong with a request's fields; the value itself, which may be long, is not repeated."""
    first = error.errors()[0]
    # FastAPI names the body, and pydantic the kind of a part behind its number
    path = [str(part) for i, part in enumerate(first["loc"]) if i or part != "body"]
    path = [part for i, part in enumerate(path) if not (part in PART_TYPES and path[i - 1].isdigit())]
    param = ".".join(path) or None
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is no JSON: {first.get('ctx', {}).get('error')}", code="invalid_json")
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"this server does not know the parameter {param}", param, "unknown_parameter")
    return ApiError(400, f"{param or 'body'}: {first['msg']}", param, "invalid_value")


def unexpected_error() -> ApiError:
    """What a client is told of the exception at hand, which nobody foresaw; the log has it."""
    logger.exception("a request failed")
    return ApiError(500, "the server failed on this request; its log says why")


def add_error_handlers(api: FastAPI) -> None:
    """Makes every error of an application, its own and the framework's, one of the API's."""

    @api.exception_handler(ApiError)
    async def told(request: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @api.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return refuse_validation(error).response()

    @api.exception_handler(HTTPException)
    async def of_framework(request: Request, error: HTTPException) -> JSONResponse:
        message = {
            404: f"there is no {request.url.path} here",
            405: f"{request.method} is not for {request.url.path}",
        }.get(error.status_code, str(error.detail))
        return ApiError(error.status_code, message).response()

    @api.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        return unexpected_error().response()
