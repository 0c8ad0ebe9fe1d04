/* The gradient of MAML in a row of linear layers, for all tasks: the inner steps, the query loss, and the way back.

   Of each task, with h_0 = x, a_l = h_{l-1} W_l^T + b_l, h_l = s_l(a_l), a loss of h_L, and rates alpha_j of each tensor:
     a step    theta_{j+1} = theta_j - alpha_j g(theta_j), g the support loss's gradient:  d_l = p_l s_l',
               p_{l-1} = d_l W_l,  g_W = d_l^T h_{l-1},  g_b = sum d_l,  from p_L = dloss/dh_L
     back      v_K = w dloss_query/dtheta_K,  v_j = v_{j+1} - H_j (alpha_j v_{j+1}), by Pearlmutter with u = alpha_j v:
               a'_l = t_{l-1} W_l^T + h_{l-1} u_W^T + u_b,  t_l = a'_l s_l',  from t_0 = 0
               c_l = q_l s_l' + d_l a'_l s_l''/s_l',  q_{l-1} = c_l W_l + d_l u_W,  from q_L = (d^2 loss) t_L
               H u = d_l^T t_{l-1} + c_l^T h_{l-1} for W_l, sum c_l for b_l
   One task runs on one thread, in memory that stays near; tasks are added in their order, whatever the threads. Matrices
   are (in, out) here, W^T, with the columns filled up to whole vectors; W itself is kept beside it for the way back. */
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <tgmath.h>
#undef I

#ifdef __AVX__
#define BYTES 32
#else
#define BYTES 16
#endif
#if defined(__AVX512VL__) || defined(__aarch64__) /* 32 registers for vectors, or 16 */
enum { ROWS = 5, COLS = 5 };
#else
enum { ROWS = 4, COLS = 3 };
#endif
typedef REAL R;
typedef ptrdiff_t I;
typedef R V __attribute__((vector_size(BYTES), may_alias));
enum { LANES = BYTES / sizeof(R), LAYERS = 16, IDENTITY = 0, RELU, TANH, SIGMOID, SQUARES = 0, CROSS_ENTROPY };
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")
#define EACH(count) _Pragma("omp simd") for (I e = 0; e < (count); e++)

/* Layers l = 0 ... L - 1 go from d[l] to d[l + 1]; p is d filled up; where things begin in a block of parameters or rows. */
typedef struct {
    I L, d[LAYERS + 1], p[LAYERS + 1], w[LAYERS], b[LAYERS], turned[LAYERS], own, all, at[LAYERS + 1], wide;
    int act[LAYERS];
} Row;

static Row described(I L, const I *d, const int *act)
{
    Row r = {.L = L};
    for (I l = 0; l <= L; l++) {
        r.d[l] = d[l], r.p[l] = (d[l] + LANES - 1) / LANES * LANES;
        if (l) r.at[l] = r.wide, r.wide += r.p[l];
    }
    for (I l = 0; l < L; l++) {
        r.act[l] = act[l];
        r.w[l] = r.own, r.b[l] = r.own + d[l] * r.p[l + 1], r.own = r.b[l] + r.p[l + 1];
    }
    r.all = r.own;
    for (I l = 1; l < L; l++) r.turned[l] = r.all, r.all += d[l + 1] * r.p[l];
    return r;
}

/* out = c + scale A B of so many rows and columns of vectors; A (rows, k) has any strides, c may be NULL: 0 */
INLINE void tile(const int rows, const int cols, I k, const R *a, I down, I right, const R *b, I n, const R *c, R scale, R *out)
{
    V sum[ROWS][COLS];
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int j = 0; j < cols; j++) sum[r][j] = (V){0};
    for (I i = 0; i < k; i++, a += right, b += n)
        UNROLL for (int j = 0; j < cols; j++) {
            const V x = *(const V *)(b + j * LANES);
            UNROLL for (int r = 0; r < rows; r++) sum[r][j] += a[r * down] * x;
        }
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int j = 0; j < cols; j++) {
        V *to = (V *)(out + r * n + j * LANES);
        *to = c ? *(const V *)(c + r * n + j * LANES) + scale * sum[r][j] : scale * sum[r][j];
    }
}

INLINE void column(const int cols, I m, I k, const R *a, I down, I right, const R *b, I n, const R *c, R scale, R *out)
{
    I r = 0;
    for (; r + ROWS <= m; r += ROWS) tile(ROWS, cols, k, a + r * down, down, right, b, n, c ? c + r * n : c, scale, out + r * n);
    for (; r < m; r++) tile(1, cols, k, a + r * down, down, right, b, n, c ? c + r * n : c, scale, out + r * n);
}

/* out (m, n) = c + scale A B, for A (m, k) of any strides, B (k, n), c (m, n) or NULL, which out may be itself */
static void product(I m, I k, I n, const R *a, I down, I right, const R *b, const R *c, R scale, R *out)
{
    for (I j = 0; j < n;) {
        const I left = (n - j) / LANES;
        const R *cj = c ? c + j : c;
        switch (left < COLS ? left : COLS) {
#if defined(__AVX512VL__) || defined(__aarch64__)
        case 5: column(5, m, k, a, down, right, b + j, n, cj, scale, out + j), j += 5 * LANES; break;
        case 4: column(4, m, k, a, down, right, b + j, n, cj, scale, out + j), j += 4 * LANES; break;
#endif
        case 3: column(3, m, k, a, down, right, b + j, n, cj, scale, out + j), j += 3 * LANES; break;
        case 2: column(2, m, k, a, down, right, b + j, n, cj, scale, out + j), j += 2 * LANES; break;
        default: column(1, m, k, a, down, right, b + j, n, cj, scale, out + j), j += LANES;
        }
    }
}

/* to (n, m) = the transpose of from (m, n), with row lengths of their own */
static void turn(I m, I n, const R *restrict from, I from_length, R *restrict to, I to_length)
{
    enum { B = 8 };
    I i = 0;
    for (; i + B <= m; i += B)
        for (I j = 0; j < n; j++)
            UNROLL for (int e = 0; e < B; e++) to[j * to_length + i + e] = from[(i + e) * from_length + j];
    for (; i < m; i++)
        for (I j = 0; j < n; j++) to[j * to_length + i] = from[i * from_length + j];
}

static void turn_all(const Row *r, R *theta)
{
    for (I l = 1; l < r->L; l++) turn(r->d[l], r->d[l + 1], theta + r->w[l], r->p[l + 1], theta + r->turned[l], r->p[l]);
}

static void activate(int act, I count, R *h)
{
    if (act == RELU) EACH(count) h[e] = h[e] <= 0 ? 0 : h[e]; /* NaN comes through */
    if (act == TANH) for (I e = 0; e < count; e++) h[e] = tanh(h[e]);
    if (act == SIGMOID) for (I e = 0; e < count; e++) h[e] = 1 / (1 + exp(-h[e]));
}

/* out = in s'(a), by the value h = s(a) */
static void slope(int act, I count, const R *h, const R *in, R *out)
{
    if (act == IDENTITY && in != out) memcpy(out, in, count * sizeof(R));
    if (act == RELU) EACH(count) out[e] = h[e] <= 0 ? 0 : in[e];
    if (act == TANH) EACH(count) out[e] = in[e] * (1 - h[e] * h[e]);
    if (act == SIGMOID) EACH(count) out[e] = in[e] * (1 - h[e]) * h[e];
}

/* h: the rows of h_1 ... h_L, N at a time */
static void forward(const Row *r, I N, const R *theta, const R *x, R *h)
{
    for (I l = 0; l < r->L; l++) {
        const I n = r->p[l + 1];
        R *out = h + N * r->at[l + 1];
        for (I i = 0; i < N; i++) memcpy(out + i * n, theta + r->b[l], n * sizeof(R));
        product(N, r->d[l], n, l ? h + N * r->at[l] : x, l ? r->p[l] : r->d[0], 1, theta + r->w[l], out, 1, out);
        activate(r->act[l], N * n, out);
    }
}

/* d: p_L at its end, then all d_l */
static void backward(const Row *r, I N, const R *theta, const R *h, R *d)
{
    for (I l = r->L - 1; l >= 0; l--) {
        R *here = d + N * r->at[l + 1];
        slope(r->act[l], N * r->p[l + 1], h + N * r->at[l + 1], here, here);
        if (l) product(N, r->d[l + 1], r->p[l], here, r->p[l + 1], 1, theta + r->turned[l], NULL, 1, d + N * r->at[l]);
    }
}

/* to = from + scale d^T h of one layer, and sum d for its bias; from may be NULL: 0 */
static void outer(const Row *r, I l, I N, const R *h, I length, const R *d, const R *from, R scale, R of_bias, R *to)
{
    static const R one = 1;
    const I n = r->p[l + 1];
    if (scale != 0) product(r->d[l], N, n, h, 1, length, d, from ? from + r->w[l] : NULL, scale, to + r->w[l]);
    else if (from != to) memcpy(to + r->w[l], from + r->w[l], r->d[l] * n * sizeof(R));
    if (of_bias != 0) product(1, N, n, &one, 0, 0, d, from ? from + r->b[l] : NULL, of_bias, to + r->b[l]);
    else if (from && from != to) memcpy(to + r->b[l], from + r->b[l], n * sizeof(R));
}

/* The loss of z (N, W), rows so long, at y (N, W); p = scale dloss/dz */
static R loss(int kind, I N, I W, I length, const R *z, const R *y, R scale, R *p)
{
    double sum = 0;
    for (I i = 0; i < N; i++, z += length, p += length, y += W) {
        if (kind == SQUARES) {
            for (I o = 0; o < W; o++) {
                const R gap = z[o] - y[o];
                sum += gap * gap, p[o] = scale * 2 * gap / (N * W);
            }
            continue;
        }
        R most = z[0], all = 0, mass = 0;
        for (I o = 1; o < W; o++) most = z[o] <= most ? most : z[o];
        for (I o = 0; o < W; o++) p[o] = exp(z[o] - most), all += p[o], mass += y[o];
        for (I o = 0; o < W; o++) {
            sum -= y[o] * (z[o] - most - log(all));
            p[o] = scale * (p[o] / all * mass - y[o]) / N;
        }
    }
    return sum / (kind == SQUARES ? N * W : N);
}

/* q = (d^2 loss) t */
static void curvature(int kind, I N, I W, I length, const R *z, const R *y, const R *t, R *q)
{
    for (I i = 0; i < N; i++, z += length, t += length, q += length, y += W) {
        if (kind == SQUARES) {
            for (I o = 0; o < W; o++) q[o] = 2 * t[o] / (N * W);
            continue;
        }
        R most = z[0], all = 0, mass = 0, mean = 0;
        for (I o = 1; o < W; o++) most = z[o] <= most ? most : z[o];
        for (I o = 0; o < W; o++) q[o] = exp(z[o] - most), all += q[o], mass += y[o];
        for (I o = 0; o < W; o++) q[o] /= all, mean += q[o] * t[o];
        for (I o = 0; o < W; o++) q[o] *= (t[o] - mean) * mass / N;
    }
}

/* v -= H (rates v) at theta; h and d are those of theta's step, a, t, c and turned room */
static void pull_back(const Row *r, I N, int kind, const R *theta, const R *x, const R *y, const R *h, const R *d,
                      const R *rates, R *v, R *a, R *t, R *c)
{
    const I L = r->L, end = N * r->at[L];
    turn_all(r, v);
    for (I l = 0; l < L; l++) {
        const I n = r->p[l + 1], here = N * r->at[l + 1], before = N * r->at[l];
        R *al = a + here;
        for (I i = 0; i < N; i++) for (I o = 0; o < n; o++) al[i * n + o] = rates[2 * l + 1] * v[r->b[l] + o];
        if (l) product(N, r->d[l], n, t + before, r->p[l], 1, theta + r->w[l], al, 1, al);
        product(N, r->d[l], n, l ? h + before : x, l ? r->p[l] : r->d[0], 1, v + r->w[l], al, rates[2 * l], al);
        slope(r->act[l], N * n, h + here, al, t + here);
    }
    curvature(kind, N, r->d[L], r->p[L], h + end, y, t + end, c + end);
    for (I l = L - 1; l >= 0; l--) {
        const I n = r->p[l + 1], here = N * r->at[l + 1], before = N * r->at[l];
        const R *hl = h + here, *dl = d + here, *al = a + here;
        R *cl = c + here;
        slope(r->act[l], N * n, hl, cl, cl);
        if (r->act[l] == TANH) EACH(N * n) cl[e] -= 2 * hl[e] * dl[e] * al[e];
        if (r->act[l] == SIGMOID) EACH(N * n) cl[e] += (1 - 2 * hl[e]) * dl[e] * al[e];
        if (l) {
            product(N, r->d[l + 1], r->p[l], cl, n, 1, theta + r->turned[l], NULL, 1, c + before);
            product(N, r->d[l + 1], r->p[l], dl, n, 1, v + r->turned[l], c + before, rates[2 * l], c + before);
            product(r->d[l], N, n, t + before, 1, r->p[l], dl, v + r->w[l], -1, v + r->w[l]);
        }
        outer(r, l, N, l ? h + before : x, l ? r->p[l] : r->d[0], cl, v, -1, -1, v);
    }
}

/* values (T) of the query loss at theta_K, and the gradient of sum w values: the tensors of `grads`, as those of `weights`
   W_1, b_1, ..., where a bias may be NULL. `rates` (K, 2L) are those of W and b, 0 where one does not move. With `second`
   0 the steps count as constants. 0, or 1 where there is no memory. */
int gradient(I L, const I *widths, const int *acts, I T, I N, I Q, const R *xs, const R *ys, const R *xq, const R *yq,
             const R *const *weights, int inner, int outside, I K, const R *rates, int second, const R *w, int threads,
             R *values, R *const *grads)
{
    const Row row = described(L, widths, acts), *r = &row;
    const I D = widths[0], W = widths[L], most = N > Q ? N : Q, steps = second ? K : 1, size = most * r->wide;
    const I room = (steps + 1) * r->all + 2 * steps * N * r->wide + 5 * size + r->all;
    R *start = NULL, *found = NULL;
    int failed = posix_memalign((void **)&start, 64, r->all * sizeof(R)) || posix_memalign((void **)&found, 64, T * r->own * sizeof(R));
    if (failed) return free(start), 1;
    memset(start, 0, r->all * sizeof(R));
    for (I l = 0; l < L; l++) {
        turn(widths[l + 1], widths[l], weights[2 * l], widths[l], start + r->w[l], r->p[l + 1]);
        if (weights[2 * l + 1]) memcpy(start + r->b[l], weights[2 * l + 1], widths[l + 1] * sizeof(R));
    }
    turn_all(r, start);
    #pragma omp parallel num_threads(threads) reduction(|| : failed)
    {
        R *own = NULL;
        if (posix_memalign((void **)&own, 64, room * sizeof(R))) own = NULL, failed = 1;
        else memset(own, 0, room * sizeof(R));
        R *theta = own, *h = theta + (steps + 1) * r->all, *d = h + steps * N * r->wide, *ahead = d + steps * N * r->wide;
        R *a = ahead + size, *t = a + size, *c = t + size, *spare = c + size, *v = spare + size;
        #pragma omp for schedule(dynamic)
        for (I i = 0; i < T; i++) {
            if (!own) continue;
            const R *x = xs + i * N * D, *y = ys + i * N * W;
            const R *now = memcpy(theta, start, r->all * sizeof(R));
            for (I j = 0; j < K; j++) {
                const I at = second ? j : 0;
                R *hj = h + at * N * r->wide, *dj = d + at * N * r->wide, *next = theta + (at + 1) * r->all;
                forward(r, N, now, x, hj);
                loss(inner, N, W, r->p[L], hj + N * r->at[L], y, 1, dj + N * r->at[L]);
                backward(r, N, now, hj, dj);
                for (I l = 0; l < L; l++)
                    outer(r, l, N, l ? hj + N * r->at[l] : x, l ? r->p[l] : D, dj + N * r->at[l + 1], now,
                          -rates[2 * (j * L + l)], -rates[2 * (j * L + l) + 1], next);
                turn_all(r, next);
                if (second) now = next;
                else now = memcpy(theta, next, r->all * sizeof(R));
            }
            forward(r, Q, now, xq + i * Q * D, ahead);
            values[i] = loss(outside, Q, W, r->p[L], ahead + Q * r->at[L], yq + i * Q * W, w[i], spare + Q * r->at[L]);
            backward(r, Q, now, ahead, spare);
            for (I l = 0; l < L; l++)
                outer(r, l, Q, l ? ahead + Q * r->at[l] : xq + i * Q * D, l ? r->p[l] : D, spare + Q * r->at[l + 1], NULL, 1, 1, v);
            for (I j = second ? K - 1 : -1; j >= 0; j--)
                pull_back(r, N, inner, theta + j * r->all, x, y, h + j * N * r->wide, d + j * N * r->wide,
                          rates + 2 * j * L, v, a, t, c);
            memcpy(found + i * r->own, v, r->own * sizeof(R));
        }
        free(own);
    }
    for (I i = 1; i < T; i++) EACH(r->own) found[e] += found[i * r->own + e];
    for (I l = 0; l < L; l++) {
        turn(widths[l], widths[l + 1], found + r->w[l], r->p[l + 1], grads[2 * l], widths[l]);
        if (grads[2 * l + 1]) memcpy(grads[2 * l + 1], found + r->b[l], widths[l + 1] * sizeof(R));
    }
    return free(start), free(found), failed;
}
