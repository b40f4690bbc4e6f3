// The server's answers. See mistral_ft/review_app.py.

export class ApiError extends Error {
  constructor(status, data) {
    super(data.error || `the server answered ${status}`);
    this.status = status;
    this.data = data;
  }
}

async function request(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new ApiError(0, { error: "the server does not answer; is it still running?" });
  }
  const text = await response.text();
  let data;
  try {
    data = JSON.parse(text);
  } catch {
    data = { error: text.slice(0, 300) };
  }
  if (!response.ok) throw new ApiError(response.status, data);
  return data;
}

/** GET /api/<name>; parameters are [name, value] pairs or an object. */
export const get = (name, parameters = {}) => request(`/api/${name}?${new URLSearchParams(parameters)}`);

/** POST /api/<name> with a JSON object. */
export const post = (name, data) =>
  request(`/api/${name}`, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(data),
  });
