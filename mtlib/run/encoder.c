/* Between the matrix products of a transformer: attention, layer norm and GELU, with what their second derivatives take.

   Each reads its rows once, while they are in the cache, and writes its results once. A head's queries, keys and values
   are read where the projection left them, side by side in a row, so that nothing is permuted. */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef REAL R;
typedef ptrdiff_t I;
typedef R V __attribute__((vector_size(64), aligned(sizeof(R)), may_alias));
enum { LANES = 64 / sizeof(R), SINGLE = sizeof(R) == 4, BLOCK = 64 };
#define EACH(n) _Pragma("omp simd") for (I c = 0; c < (n); c++)
#define AFTER(a, b) ((a) > (b) || (a) != (a))
#define PARALLEL(i, n) _Pragma("omp parallel for num_threads(threads)") for (I i = 0; i < (n); i++)

static I padded(I n) { return (n + LANES - 1) / LANES * LANES; }

/* e^t: 2^n e^r with |r| <= ln(2)/2, by Taylor's series; 0 below the smallest number. In double precision the system's. */
static inline R power(R t)
{
    if (!SINGLE) return exp(t);
    const R live = t < (R)-87 ? 0 : 1;
    t = t < (R)-87 ? (R)-87 : t;
    const R n = (R)floorf((float)(t * (R)1.44269504 + (R)0.5)), r = t - n * (R)0.693359375 + n * (R)2.12194440e-4;
    R p = 1 + r / 7;
    for (int k = 6; k; k--) p = 1 + p * r * (1 / (R)k);
    const int32_t bits = ((int32_t)n + 127) << 23;
    float two;
    memcpy(&two, &bits, 4);
    return live * p * (R)two;
}

/* Attention: y = softmax(s q k^T) v for each head of each sequence ------------------------------------------------ */

/* c (M, N) = s a b, or c + s a b, for a with any strides, b (K, N); M and N in steps of 4 and LANES. */
static inline void product(const R *a, I ai, I ak, const R *b, I M, I K, I N, R s, int onto, R *c)
{
    for (I n = 0; n < N; n += LANES) for (I i = 0; i < M; i += 4) {
        V c0 = {0}, c1 = {0}, c2 = {0}, c3 = {0};
        const R *at = a + i * ai;
        for (I k = 0; k < K; k++, at += ak) {
            const V row = *(const V *)(b + k * N + n);
            c0 += at[0] * row, c1 += at[ai] * row, c2 += at[2 * ai] * row, c3 += at[3 * ai] * row;
        }
        V *to[4] = {(V *)(c + i * N + n), (V *)(c + (i + 1) * N + n), (V *)(c + (i + 2) * N + n), (V *)(c + (i + 3) * N + n)};
        const V now[4] = {s * c0, s * c1, s * c2, s * c3}, none = {0};
        for (int j = 0; j < 4; j++) *to[j] = now[j] + (onto ? *to[j] : none);
    }
}

/* y (Lp, dp) = rows of d numbers, and 0 beyond them; then its transpose, and the way back */
static inline void load(const R *x, I stride, I L, I d, I Lp, I dp, R *y)
{
    if (d < dp || L < Lp) memset(y, 0, sizeof(R) * Lp * dp);
    for (I l = 0; l < L; l++) {
        if (d < dp) EACH(d) y[l * dp + c] = x[l * stride + c];
        else for (I c = 0; c < d; c += LANES) *(V *)(y + l * dp + c) = *(const V *)(x + l * stride + c);
    }
}

static inline void turn(const R *y, I Lp, I dp, R *t)
{
    for (I l = 0; l < Lp; l++) for (I c = 0; c < dp; c++) t[c * Lp + l] = y[l * dp + c];
}

static inline void store(const R *y, I dp, I L, I d, I stride, int onto, R *x)
{
    const V none = {0};
    for (I l = 0; l < L; l++) {
        if (d < dp) EACH(d) x[l * stride + c] = y[l * dp + c] + (onto ? x[l * stride + c] : 0);
        else for (I c = 0; c < d; c += LANES) {
            V *to = (V *)(x + l * stride + c);
            *to = *(const V *)(y + l * dp + c) + (onto ? *to : none);
        }
    }
}

#define HEADS PARALLEL(at, sequences * heads)
#define HEAD const I w = heads * d, row = at / heads * L, column = at % heads * d, Lp = padded(L), dp = padded(d), n = Lp * dp, m = Lp * Lp
#define FROM(x, j) (x) + row * 3 * w + (j) * w + column, 3 * w

/* qkv (N, 3, heads, d) -> y (N, heads, d), p (sequences, heads, L, L). Scores, and all that has their shape, have a row for
   each key and a column for each query: what is summed over keys is then a sum of vectors. */
void attention(const R *qkv, I sequences, I L, I heads, I d, double scale, int threads, R *y, R *p)
{
    HEADS {
        HEAD;
        R q[n], k[n], v[n], qt[n], e[m], most[Lp], sum[Lp], o[n];
        load(FROM(qkv, 0), L, d, Lp, dp, q), load(FROM(qkv, 1), L, d, Lp, dp, k), load(FROM(qkv, 2), L, d, Lp, dp, v);
        turn(q, Lp, dp, qt);
        product(k, dp, 1, qt, Lp, d, Lp, scale, 0, e);
        EACH(Lp) most[c] = e[c], sum[c] = 0;
        for (I l = 1; l < L; l++) EACH(Lp) most[c] = AFTER(e[l * Lp + c], most[c]) ? e[l * Lp + c] : most[c];
        for (I l = 0; l < L; l++)
            EACH(Lp) { const R t = power(e[l * Lp + c] - most[c]); e[l * Lp + c] = t, sum[c] += t; }
        for (I l = 0; l < L; l++) EACH(Lp) e[l * Lp + c] /= sum[c];
        store(e, Lp, L, L, L, 0, p + at * L * L);
        product(e, 1, Lp, v, Lp, L, dp, 1, 0, o);
        store(o, dp, L, d, w, 0, y + row * w + column);
    }
}

/* gs = p (gp - <gp, p>), and the products <gp, p> */
static inline void of_softmax(const R *restrict gp, const R *restrict p, I L, I Lp, R *restrict along, R *restrict gs)
{
    EACH(Lp) along[c] = 0;
    for (I l = 0; l < L; l++) EACH(Lp) along[c] += gp[l * Lp + c] * p[l * Lp + c];
    for (I l = 0; l < L; l++) EACH(Lp) gs[l * Lp + c] = p[l * Lp + c] * (gp[l * Lp + c] - along[c]);
    if (L < Lp) memset(gs + L * Lp, 0, sizeof(R) * (Lp - L) * Lp);
}

/* gqkv for g = gradient of y; or added onto what is there */
void attention_backward(const R *g, const R *qkv, const R *p, I sequences, I L, I heads, I d, double scale, int threads,
                        int onto, R *gqkv)
{
    HEADS {
        HEAD;
        R q[n], k[n], v[n], t[n], gy[n], pp[m], gp[m], gs[m], along[Lp], out[n], *to = gqkv + row * 3 * w + column;
        load(FROM(qkv, 0), L, d, Lp, dp, q), load(FROM(qkv, 1), L, d, Lp, dp, k), load(FROM(qkv, 2), L, d, Lp, dp, v);
        load(g + row * w + column, w, L, d, Lp, dp, gy), load(p + at * L * L, L, L, L, Lp, Lp, pp);
        turn(gy, Lp, dp, t), product(v, dp, 1, t, Lp, d, Lp, 1, 0, gp);
        of_softmax(gp, pp, L, Lp, along, gs);
        product(gs, 1, Lp, k, Lp, L, dp, scale, 0, out), store(out, dp, L, d, 3 * w, onto, to);
        product(gs, Lp, 1, q, Lp, L, dp, scale, 0, out), store(out, dp, L, d, 3 * w, onto, to + w);
        product(pp, Lp, 1, gy, Lp, L, dp, 1, 0, out), store(out, dp, L, d, 3 * w, onto, to + 2 * w);
    }
}

/* Cotangents of g and of qkv, for the cotangent u of gqkv. */
void attention_twice(const R *u, const R *g, const R *qkv, const R *p, I sequences, I L, I heads, I d, double scale,
                     int threads, R *to_g, R *to_qkv)
{
    HEADS {
        HEAD;
        R q[n], k[n], v[n], uq[n], uk[n], uv[n], gy[n], t[n], out[n], *to = to_qkv + row * 3 * w + column;
        R pp[m], gp[m], gs[m], a[m], b[m], of_gp[m], along[Lp], across[Lp];
        load(FROM(qkv, 0), L, d, Lp, dp, q), load(FROM(qkv, 1), L, d, Lp, dp, k), load(FROM(qkv, 2), L, d, Lp, dp, v);
        load(FROM(u, 0), L, d, Lp, dp, uq), load(FROM(u, 1), L, d, Lp, dp, uk), load(FROM(u, 2), L, d, Lp, dp, uv);
        load(g + row * w + column, w, L, d, Lp, dp, gy), load(p + at * L * L, L, L, L, Lp, Lp, pp);
        turn(gy, Lp, dp, t), product(v, dp, 1, t, Lp, d, Lp, 1, 0, gp), product(uv, dp, 1, t, Lp, d, Lp, 1, 0, b);
        of_softmax(gp, pp, L, Lp, along, gs);
        turn(uq, Lp, dp, t), product(k, dp, 1, t, Lp, d, Lp, scale, 0, a);
        turn(q, Lp, dp, t), product(uk, dp, 1, t, Lp, d, Lp, scale, 1, a); /* of gs */
        of_softmax(a, pp, L, Lp, across, of_gp);
        for (I l = 0; l < L; l++)
            EACH(Lp) b[l * Lp + c] += a[l * Lp + c] * (gp[l * Lp + c] - along[c]) - gp[l * Lp + c] * across[c];
        of_softmax(b, pp, L, Lp, along, a); /* of s q k^T */
        product(pp, 1, Lp, uv, Lp, L, dp, 1, 0, out), product(of_gp, 1, Lp, v, Lp, L, dp, 1, 1, out);
        store(out, dp, L, d, w, 0, to_g + row * w + column);
        product(a, 1, Lp, k, Lp, L, dp, scale, 0, out), product(gs, 1, Lp, uk, Lp, L, dp, scale, 1, out);
        store(out, dp, L, d, 3 * w, 0, to);
        product(a, Lp, 1, q, Lp, L, dp, scale, 0, out), product(gs, Lp, 1, uq, Lp, L, dp, scale, 1, out);
        store(out, dp, L, d, 3 * w, 0, to + w);
        product(of_gp, Lp, 1, gy, Lp, L, dp, 1, 0, out);
        store(out, dp, L, d, 3 * w, 0, to + 2 * w);
    }
}

/* Layer norm of the N rows of each of T tasks, y = gamma xh + beta ------------------------------------------------ */

/* P t = r (t - <t> - xh <t xh>), from the sums of t and t xh */
#define PROJECTED(t, sum, sum_hat) (rate * ((t) - (sum) / n - h[c] * ((sum_hat) / n)))

void norm(const R *x, const R *gamma, const R *beta, double eps, I T, I N, I n, int threads, R *y, R *xh, R *r)
{
    PARALLEL(task, T) for (I i = task * N; i < (task + 1) * N; i++) {
        const R *restrict u = x + i * n, *restrict w = gamma + task * n, *restrict b = beta + task * n;
        R *restrict h = xh + i * n, *restrict out = y + i * n, sum = 0, square = 0;
        _Pragma("omp simd reduction(+ : sum)") for (I c = 0; c < n; c++) sum += u[c];
        const R mean = sum / n;
        _Pragma("omp simd reduction(+ : square)") for (I c = 0; c < n; c++) square += (u[c] - mean) * (u[c] - mean);
        const R rate = r[i] = 1 / sqrt(square / n + eps);
        EACH(n) h[c] = (u[c] - mean) * rate, out[c] = w[c] * h[c] + b[c];
    }
}

static void flush(R *block, I n, double *sum)
{
    EACH(n) sum[c] += block[c], block[c] = 0;
}

/* gx, ggamma, gbeta; or added onto what is there */
void norm_backward(const R *g, const R *gamma, const R *xh, const R *r, I T, I N, I n, int threads, int onto,
                   R *gx, R *ggamma, R *gbeta)
{
    PARALLEL(task, T) {
        R block[2 * n], *restrict to_w = block, *restrict to_b = block + n;
        double sum[2 * n];
        EACH(2 * n) block[c] = 0, sum[c] = 0;
        const R *restrict w = gamma + task * n;
        for (I j = 0; j < N; j++) {
            const I i = task * N + j;
            const R *restrict t = g + i * n, *restrict h = xh + i * n, rate = r[i];
            R *restrict to = gx + i * n, a = 0, b = 0;
            _Pragma("omp simd reduction(+ : a, b)") for (I c = 0; c < n; c++) {
                a += t[c] * w[c], b += t[c] * w[c] * h[c];
                to_w[c] += t[c] * h[c], to_b[c] += t[c];
            }
            if (onto) EACH(n) to[c] += PROJECTED(t[c] * w[c], a, b);
            else EACH(n) to[c] = PROJECTED(t[c] * w[c], a, b);
            if (j % BLOCK == BLOCK - 1) flush(block, 2 * n, sum);
        }
        flush(block, 2 * n, sum);
        EACH(n) ggamma[task * n + c] = sum[c] + (onto ? ggamma[task * n + c] : 0);
        EACH(n) gbeta[task * n + c] = sum[n + c] + (onto ? gbeta[task * n + c] : 0);
    }
}

/* Cotangents of g, x and gamma, for v, vw, vb of gx, ggamma, gbeta. */
void norm_twice(const R *v, const R *vw, const R *vb, const R *g, const R *gamma, const R *xh, const R *r, I T, I N, I n,
                int threads, R *to_g, R *to_x, R *to_gamma)
{
    PARALLEL(task, T) {
        R block[n], pv[n], d[n];
        double sum[n];
        EACH(n) block[c] = 0, sum[c] = 0;
        const R *restrict w = gamma + task * n, *restrict uw = vw + task * n, *restrict ub = vb + task * n;
        for (I j = 0; j < N; j++) {
            const I i = task * N + j;
            const R *restrict t = v + i * n, *restrict q = g + i * n, *restrict h = xh + i * n, rate = r[i];
            R *restrict tg = to_g + i * n, *restrict tx = to_x + i * n;
            R a = 0, b = 0, gh = 0, gpv = 0, e = 0, f = 0;
            _Pragma("omp simd reduction(+ : a, b, gh)") for (I c = 0; c < n; c++)
                a += t[c], b += t[c] * h[c], gh += q[c] * w[c] * h[c];
            _Pragma("omp simd reduction(+ : gpv)") for (I c = 0; c < n; c++) {
                pv[c] = PROJECTED(t[c], a, b);
                gpv += q[c] * w[c] * pv[c];
                tg[c] = w[c] * pv[c] + uw[c] * h[c] + ub[c];
                block[c] += q[c] * pv[c];
            }
            const R x = rate * (b / n), y = rate * (gh / n), z = rate * (gpv / n);
            _Pragma("omp simd reduction(+ : e, f)") for (I c = 0; c < n; c++) {
                d[c] = q[c] * uw[c] - q[c] * w[c] * x - t[c] * y;
                e += d[c], f += d[c] * h[c];
            }
            EACH(n) tx[c] = PROJECTED(d[c], e, f) - h[c] * z;
            if (j % BLOCK == BLOCK - 1) flush(block, n, sum);
        }
        flush(block, n, sum);
        EACH(n) to_gamma[task * n + c] = sum[c];
    }
}

/* GELU: y = a Phi(a), and its derivatives Phi + a phi and phi (2 - a^2) ------------------------------------------- */

/* Phi(-|a|) = phi(a) t P(t) with t = 1 / (1 + 0.21 |a|), a fit of Mills' ratio with relative error 2e-8. */
static inline R tail(R a, R density)
{
    if (!SINGLE) return erfc((a < 0 ? -a : a) * 0.70710678118654752440) / 2;
    static const float fit[] = {0.2098335944, 0.213239357, 0.1734161931, 0.3130956148, -0.2356316688,
                                0.8760950947, -0.8280588592, 0.7109631217, -0.1796382921};
    const R t = 1 / (1 + (R)0.21 * (a < 0 ? -a : a));
    R p = fit[8];
    for (int k = 7; k >= 0; k--) p = p * t + fit[k];
    return density * t * p;
}

void gelu(const R *a, I count, int threads, R *y, R *first, R *second)
{
    const I size = 1 << 12;
    PARALLEL(part, (count + size - 1) / size) {
        const I from = part * size, n = count - from < size ? count - from : size;
        const R *restrict x = a + from;
        R *restrict y0 = y + from, *restrict y1 = first + from, *restrict y2 = second + from;
        EACH(n) {
            const R density = power(-x[c] * x[c] / 2) * (R)0.39894228040143267794, rest = tail(x[c], density);
            const R below = x[c] < 0 ? rest : 1 - rest;
            y0[c] = x[c] * below, y1[c] = below + x[c] * density, y2[c] = density * (2 - x[c] * x[c]);
        }
    }
}

/* to_g = v s, to_x = v g k */
void gelu_twice(const R *v, const R *g, const R *first, const R *second, I count, int threads, R *to_g, R *to_x)
{
    const I size = 1 << 12;
    PARALLEL(part, (count + size - 1) / size) {
        const I from = part * size, n = count - from < size ? count - from : size;
        const R *restrict t = v + from, *restrict q = g + from, *restrict s = first + from, *restrict k = second + from;
        R *restrict tg = to_g + from, *restrict tx = to_x + from;
        EACH(n) tg[c] = t[c] * s[c], tx[c] = t[c] * q[c] * k[c];
    }
}
