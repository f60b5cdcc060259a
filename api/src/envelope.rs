//! What every answer is wrapped in.

use axum::{
    Json,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::Serialize;
use utoipa::ToSchema;

/// An answer with a result.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct Envelope<T> {
    /// None.
    pub errors: Vec<Message>,
    /// None.
    pub messages: Vec<Message>,
    /// What was asked for.
    pub result: T,
    /// Always true.
    #[schema(default = true)]
    pub success: bool,
}

/// A refusal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct Failure {
    /// Everything that is wrong.
    #[schema(min_items = 1)]
    pub errors: Vec<Message>,
    /// None.
    pub messages: Vec<Message>,
    /// Always null.
    pub result: Option<()>,
    /// Always false.
    #[schema(default = false)]
    pub success: bool,
}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[expect(clippy::struct_field_names, reason = "the API has it so")]
pub struct Message {
    /// Tells kinds of errors apart.
    #[schema(minimum = 1000)]
    pub code: u16,
    /// What is wrong, and what to do about it.
    pub message: String,
    /// Where it is wrong.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub source: Option<Source>,
}

/// A place in a request's body.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct Source {
    /// A JSON pointer.
    pub pointer: String,
}

/// Answers with a result.
pub fn success<T: Serialize>(result: T) -> Response {
    Json(Envelope { errors: Vec::new(), messages: Vec::new(), result, success: true })
        .into_response()
}

/// Answers with what is wrong.
pub fn failure(status: StatusCode, errors: Vec<Message>) -> Response {
    let body = Failure { errors, messages: Vec::new(), result: None, success: false };
    ([(header::CACHE_CONTROL, "no-store")], (status, Json(body))).into_response()
}
